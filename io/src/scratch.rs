//! The zones of a volume in files without a name, for who measures a file system and leaves nothing on it.
//!
//! # Crash
//! Nothing of it is found again: the files have no entry in the directory before the first byte is written.

use std::path::Path;
use std::sync::Arc;

use crate::backend::Executors;
use crate::file::{Extent, OpenFile};
use crate::{BLOCK_BYTES, Error, MediaOptions, Result, Zone};

/// Zones as a volume has them, made, opened and served in the same way. Gone when the last handle is.
#[derive(Clone, Debug)]
pub struct Scratch {
    /// The zone of a log: written once with zeroes, on a device of its own.
    pub wal: Zone,
    /// The zone of extents: sparse, to be allocated before it is written.
    pub data: Zone,
}

/// Makes files for zones of `wal_bytes` and `data_bytes` in `directory` and starts the backend that would serve them there.
///
/// Blocks until the log's zone is written and durable.
///
/// # Errors
/// `Unusable` with the path and what to do about it; `OutOfSpace`; `Os`.
pub fn open_scratch(directory: &Path, wal_bytes: u64, data_bytes: u64, options: &MediaOptions) -> Result<Scratch> {
    let block = BLOCK_BYTES as u64;
    if wal_bytes == 0 || !wal_bytes.is_multiple_of(block) || !data_bytes.is_multiple_of(block) {
        let message = format!("zones are multiples of {block} wal_bytes={wal_bytes} data_bytes={data_bytes}");
        return Err(Error::unusable("open", message));
    }
    let mut wal = OpenFile::unnamed(directory, Extent::Length)?;
    wal.zero(0, wal_bytes)?;
    wal.measure()?;
    let (wal, data) = (Arc::new(wal), Arc::new(OpenFile::unnamed(directory, Extent::Sparse)?));
    let executors = Executors::start(options.backend, &wal)?;
    Ok(Scratch {
        wal: Zone::new(executors.wal_device(wal), 0, wal_bytes),
        data: Zone::new(executors.data_device(data), 0, data_bytes),
    })
}
