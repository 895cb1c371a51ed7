//! The tree of a memtable: every version of the keys written in one generation, in order, by one writer beside any number of
//! readers that take no lock and wait for nobody.
//!
//! [`Writer::new`] makes an empty tree. [`Writer::insert`] adds versions; [`Reader::get`] and [`Reader::cursor`] find what was
//! visible at an index. What a reader may see must have been inserted before it asks: whoever publishes the index of a version
//! does that after the insert, by a store that the reader's load of the index synchronises with. What a version says of its key is its
//! [`Kind`]; what operands make of what is below them is for whoever inserts and reads.
//!
//! # Place
//! below `engine`, whose `memtable` adds removed ranges and the memory budget. Knows bytes and indexes; no log, no I/O
//! # Why not
//! Locks around leaves, and paths that are copied: what stood here before. docs/rfcs/0003-memtable-tree.md has the numbers.
#![deny(unsafe_code)]

mod arena;
mod cursor;
mod entry;
pub mod key;
#[cfg(all(test, loom))]
mod loom_tests;
mod node;
mod sync;
#[cfg(all(test, not(loom)))]
mod tests;
mod tree;

pub use cursor::Cursor;
pub use entry::{INLINE_BYTES_MAX, Kind, New, Version};
pub use tree::{Reader, Writer};
