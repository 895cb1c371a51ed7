//! Which units of the extents zone are free, reserved, live, or on their way back.
//!
//! # Place
//! part of [`super::Volume`]; the free map is derived at open from what the manifests name, never stored
//! # Invariants
//! 1. Every unit is in exactly one state: free, reserved, live, parked (freed, but a superblock that is durable may still
//!    name it) or leaving (being discarded).
//! 2. A unit leaves `parked` only after a superblock is durable whose update began after the unit was freed.
//! 3. A unit is free only when its discard has completed, so that no discard meets a later write.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_io::{Spawner, Zone};

use super::extent::{EXTENT_UNIT_BYTES, Extent, extents_bytes};
use super::free_map::FreeMap;
use crate::{Error, ErrorKind, Result};

/// Extents that one reservation may consist of.
pub(crate) const RESERVATION_EXTENTS_MAX: usize = 1024;

#[derive(Default)]
struct State {
    free: FreeMap,
    live_units: u64,
    reserved_units: u64,
    leaving_units: u64,
    parked: Vec<Extent>,
    /// The free map says nothing before the live extents are known.
    known: bool,
}

pub(crate) struct Allocator {
    state: Mutex<State>,
    zone: Zone,
    units: u32,
    spawner: Arc<dyn Spawner>,
}

/// Bytes by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpaceStats {
    pub(crate) total_bytes: u64,
    pub(crate) free_bytes: u64,
    pub(crate) reserved_bytes: u64,
    pub(crate) live_bytes: u64,
    /// Freed, but not usable before the next superblock.
    pub(crate) parked_bytes: u64,
    pub(crate) leaving_bytes: u64,
}

/// Space set aside for one job; what is not taken goes back when it is dropped.
pub(crate) struct Reservation {
    allocator: Arc<Allocator>,
    /// Not yet taken, in the order of the zone.
    rest: Vec<Extent>,
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reservation").field("rest", &self.rest).finish_non_exhaustive()
    }
}

impl Allocator {
    pub(crate) fn new(zone: Zone, spawner: Arc<dyn Spawner>) -> Self {
        let units = u32::try_from(zone.length() / EXTENT_UNIT_BYTES).unwrap_or(u32::MAX);
        Self { state: Mutex::default(), zone, units, spawner }
    }

    /// Each change of the state is one step under the lock; a panic in between is a failed assertion about it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells which extents are in use. Once, before anything is reserved.
    pub(crate) fn set_live(&self, live: impl IntoIterator<Item = Extent>) -> Result<()> {
        let mut free = FreeMap::new(self.units);
        let mut live_units = 0;
        for extent in live {
            if !free.take_exact(extent) {
                let message = format!(
                    "an extent is named twice or lies outside of the volume first_unit={} units={} volume_units={}",
                    extent.first_unit, extent.units, self.units
                );
                return Err(Error::new(ErrorKind::Corrupt, message));
            }
            live_units += u64::from(extent.units);
        }
        let mut state = self.lock();
        assert!(!state.known, "the live extents of a volume are set once");
        *state = State { free, live_units, known: true, ..State::default() };
        Ok(())
    }

    /// Sets aside at least `bytes`, backed by the file system, so that a full disk is met here and not in the middle of a
    /// job.
    pub(crate) async fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation> {
        let rest = {
            let mut state = self.lock();
            assert!(state.known, "space is reserved after the live extents were set");
            let units = u32::try_from(bytes.div_ceil(EXTENT_UNIT_BYTES)).ok();
            let found = units.and_then(|units| state.free.take(units, RESERVATION_EXTENTS_MAX));
            let Some(found) = found else {
                let free = state.free.free_bytes();
                let parked = extents_bytes(&state.parked);
                let message = format!("the volume is full need_bytes={bytes} free_bytes={free} parked_bytes={parked}");
                return Err(Error::new(ErrorKind::OutOfSpace, message));
            };
            state.reserved_units += units_of(&found);
            found
        };
        // Dropped on error: what was allocated on the way is given back too.
        let reservation = Reservation { allocator: self.clone(), rest };
        for extent in &reservation.rest {
            self.zone.allocate(extent.offset(), extent.bytes()).await?;
        }
        Ok(reservation)
    }

    /// Live extents are no longer named. They are usable after the next superblock.
    pub(crate) fn free(&self, extents: Vec<Extent>) {
        let mut state = self.lock();
        state.live_units = state
            .live_units
            .checked_sub(units_of(&extents))
            .expect("extents are freed once, by the one who took them or named them live");
        state.parked.extend(extents);
    }

    /// What is parked now; the caller begins a superblock update and calls [`Allocator::leave`] when it is durable.
    pub(crate) fn parked(&self) -> Vec<Extent> {
        let mut state = self.lock();
        let parked = std::mem::take(&mut state.parked);
        state.leaving_units += units_of(&parked);
        parked
    }

    /// The update was not made after all: the extents stay parked.
    pub(crate) fn park_again(&self, extents: Vec<Extent>) {
        let mut state = self.lock();
        state.leaving_units -= units_of(&extents);
        state.parked.extend(extents);
    }

    /// Live extents that the superblock which is now durable has replaced.
    pub(crate) fn retire(&self, extents: &[Extent]) {
        let units = units_of(extents);
        let mut state = self.lock();
        state.live_units = state.live_units.checked_sub(units).expect("the extents of the old root were live");
        state.leaving_units += units;
    }

    /// Discards the extents and makes them free. A device that cannot discard loses nothing but the hint.
    pub(crate) async fn leave(&self, mut extents: Vec<Extent>) {
        extents.sort();
        for extent in extents {
            if let Err(error) = self.zone.discard(extent.offset(), extent.bytes()).await {
                tracing::debug!(%error, "an extent was not discarded");
            }
            let mut state = self.lock();
            state.leaving_units -= u64::from(extent.units);
            state.free.put(extent);
        }
    }

    pub(crate) fn stats(&self) -> SpaceStats {
        let state = self.lock();
        SpaceStats {
            total_bytes: u64::from(self.units) * EXTENT_UNIT_BYTES,
            free_bytes: state.free.free_bytes(),
            reserved_bytes: state.reserved_units * EXTENT_UNIT_BYTES,
            live_bytes: state.live_units * EXTENT_UNIT_BYTES,
            parked_bytes: extents_bytes(&state.parked),
            leaving_bytes: state.leaving_units * EXTENT_UNIT_BYTES,
        }
    }
}

fn units_of(extents: &[Extent]) -> u64 {
    extents.iter().map(|e| u64::from(e.units)).sum()
}

impl Reservation {
    /// Bytes that can still be taken.
    pub(crate) fn bytes(&self) -> u64 {
        extents_bytes(&self.rest)
    }

    /// Takes extents for `bytes`; they are live from here on, and belong to the caller until they are freed.
    ///
    /// # Errors
    /// `Internal` when the reservation was too small: a mistake in the job's estimate. Nothing is taken then.
    pub(crate) fn take(&mut self, bytes: u64) -> Result<Vec<Extent>> {
        let mut need = bytes.div_ceil(EXTENT_UNIT_BYTES);
        if need > units_of(&self.rest) {
            let message = format!("a job needs more than it reserved bytes={bytes} reserved_bytes={}", self.bytes());
            return Err(Error::new(ErrorKind::Internal, message));
        }
        let mut taken = Vec::new();
        let mut rest = std::mem::take(&mut self.rest).into_iter();
        while need > 0 {
            let Some(extent) = rest.next() else { break };
            let units = u64::from(extent.units).min(need) as u32;
            taken.push(Extent { first_unit: extent.first_unit, units });
            need -= u64::from(units);
            if units < extent.units {
                self.rest.push(Extent { first_unit: extent.first_unit + units, units: extent.units - units });
            }
        }
        self.rest.extend(rest);
        let mut state = self.allocator.lock();
        state.reserved_units -= units_of(&taken);
        state.live_units += units_of(&taken);
        Ok(taken)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let rest = std::mem::take(&mut self.rest);
        if rest.is_empty() {
            return;
        }
        {
            let mut state = self.allocator.lock();
            state.reserved_units -= units_of(&rest);
            state.leaving_units += units_of(&rest);
        }
        // No superblock ever named them: they go back at once, in the background.
        let allocator = self.allocator.clone();
        let task = Box::pin(async move { allocator.leave(rest).await });
        drop(self.allocator.spawner.spawn("mainstay-discard", task));
    }
}
