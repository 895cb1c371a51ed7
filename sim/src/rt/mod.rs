//! The seeded runtime: one thread, virtual time, a seeded choice among the tasks that are ready.
//!
//! # Place
//! below the simulated network and the world; [`SimRuntime`] gives it to consensus, [`environment`] to the engine
//! # Invariants
//! - R1. Nothing here reads the machine: no clock, no thread, no entropy, no address as an order.
//! - R2. Every poll costs [`POLL_COST`] of virtual time, so nothing can run for ever at one instant.
//! - R3. User values (futures, wakers, closures) run and drop only while no lock of the executor is held.
//! - R4. A killed group stays dead: what is spawned into it afterwards is dropped unpolled.

mod environment;
mod executor;
mod rng;
mod runtime;
mod watch;

pub use environment::{WallClock, environment};
pub use executor::{Executor, Group, POLL_COST};
pub use rng::SimRng;
pub use runtime::{SimInstant, SimRuntime};
