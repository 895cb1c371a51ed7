//! Snapshots and iterators.

use std::ffi::c_char;
use std::ops::Bound;
use std::sync::{Mutex, PoisonError};

use facade::{Scan, Snapshot};

use crate::bytes::{free, handle, input, put_handle, put_out, put_value, text};
use crate::{Failure, MainstayBytes, MainstayCode, MainstayKeyspace, MainstayStore, guard};

/// A read view at one index.
pub struct MainstaySnapshot(Snapshot);

/// An ordered scan.
pub struct MainstayIterator {
    scan: Mutex<Scan>,
    reverse: bool,
}

/// Pins what is applied now. Freed with `mainstay_snapshot_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_snapshot(
    store: *const MainstayStore,
    out: *mut *mut MainstaySnapshot,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let store = handle(store, "store")?;
            put_handle(out, || Ok(MainstaySnapshot(store.0.snapshot()?)))
        }
    })
}

/// Opens a checkpoint for reading. Freed with `mainstay_snapshot_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_checkpoint_open(
    store: *const MainstayStore,
    name: *const c_char,
    out: *mut *mut MainstaySnapshot,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (store, name) = (handle(store, "store")?, text(name, "name")?);
            put_handle(out, || Ok(MainstaySnapshot(store.0.open_checkpoint(name)?)))
        }
    })
}

/// Frees a snapshot.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_snapshot_free(snapshot: *mut MainstaySnapshot) {
    // SAFETY: the caller frees a handle once.
    unsafe { free(snapshot) }
}

/// The log index whose state the snapshot shows; 0 for a null snapshot.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_snapshot_index(snapshot: *const MainstaySnapshot) -> u64 {
    // SAFETY: the caller's arguments, as the header states them.
    unsafe { snapshot.as_ref() }.map_or(0, |snapshot| snapshot.0.index().0)
}

/// Reads a key as of the snapshot. `MAINSTAY_NOT_FOUND` if it is absent. Give `out` back with `mainstay_bytes_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_snapshot_get(
    snapshot: *const MainstaySnapshot,
    keyspace: *const MainstayKeyspace,
    key: *const u8,
    key_len: usize,
    out: *mut MainstayBytes,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (snapshot, keyspace) = (handle(snapshot, "snapshot")?, handle(keyspace, "keyspace")?);
            let key = input(key, key_len)?;
            put_value(out, || Ok(snapshot.0.get(&keyspace.0, key)?))
        }
    })
}

/// Reads `count` keys as of the snapshot, with what is not in memory read from the device together. `keys` and `key_lens` have one entry for each,
/// and so has `out`: a key that is absent leaves `owner` null there. On an error nothing is lent. Give each of `out` back with
/// `mainstay_bytes_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_snapshot_multi_get(
    snapshot: *const MainstaySnapshot,
    keyspace: *const MainstayKeyspace,
    keys: *const *const u8,
    key_lens: *const usize,
    count: usize,
    out: *mut MainstayBytes,
) -> MainstayCode {
    guard(|| {
        if count == 0 {
            return Ok(());
        }
        if keys.is_null() || key_lens.is_null() || out.is_null() {
            return Err(Failure::invalid(format!("null keys, lengths or out with count={count}")));
        }
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (snapshot, keyspace) = (handle(snapshot, "snapshot")?, handle(keyspace, "keyspace")?);
            let key = |n: usize| input(*keys.add(n), *key_lens.add(n));
            let keys = (0..count).map(key).collect::<Result<Vec<_>, _>>()?;
            for (n, value) in snapshot.0.multi_get(&keyspace.0, &keys)?.into_iter().enumerate() {
                put_out(out.add(n), value.map_or_else(MainstayBytes::none, MainstayBytes::lend))?;
            }
            Ok(())
        }
    })
}

/// Iterates over keys with `lower <= key < upper` as of the snapshot; a null bound is open. With `reverse` it begins at the
/// high end. Freed with `mainstay_iterator_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_iterate(
    snapshot: *const MainstaySnapshot,
    keyspace: *const MainstayKeyspace,
    lower: *const u8,
    lower_len: usize,
    upper: *const u8,
    upper_len: usize,
    reverse: bool,
    out: *mut *mut MainstayIterator,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (snapshot, keyspace) = (handle(snapshot, "snapshot")?, handle(keyspace, "keyspace")?);
            let from = if lower.is_null() { Bound::Unbounded } else { Bound::Included(input(lower, lower_len)?) };
            let to = if upper.is_null() { Bound::Unbounded } else { Bound::Excluded(input(upper, upper_len)?) };
            put_handle(out, || {
                let scan = Mutex::new(snapshot.0.range::<&[u8]>(&keyspace.0, (from, to)));
                Ok(MainstayIterator { scan, reverse })
            })
        }
    })
}

/// The next pair. `MAINSTAY_NOT_FOUND` at the end. Give `key` and `value` back with `mainstay_bytes_free`; `value` may be null if
/// it is not wanted.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_iterator_next(
    iterator: *const MainstayIterator,
    key: *mut MainstayBytes,
    value: *mut MainstayBytes,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        let iterator = unsafe { handle(iterator, "iterator")? };
        if key.is_null() {
            return Err(Failure::invalid("null out pointer"));
        }
        let mut scan = iterator.scan.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = if iterator.reverse { scan.next_back() } else { scan.next() };
        let entry = entry.transpose()?.ok_or_else(|| Failure::not_found("the end of the range"))?;
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            put_out(key, MainstayBytes::lend(entry.key))?;
            if !value.is_null() {
                put_out(value, MainstayBytes::lend(entry.value))?;
            }
        }
        Ok(())
    })
}

/// Frees an iterator.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_iterator_free(iterator: *mut MainstayIterator) {
    // SAFETY: the caller frees a handle once.
    unsafe { free(iterator) }
}
