//! Batches: mutations applied all or none.

use std::ops::Bound;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use facade::Batch;

use crate::bytes::{free, handle, input, put_handle};
use crate::{MainstayCode, MainstayKeyspace, MainstayStore, guard};

/// Mutations collected for one commit.
pub struct MainstayBatch(Mutex<Batch>);

/// Makes an empty batch. Freed with `mainstay_batch_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_batch_new(out: *mut *mut MainstayBatch) -> MainstayCode {
    // SAFETY: the caller's arguments, as the header states them.
    guard(|| unsafe { put_handle(out, || Ok(MainstayBatch(Mutex::default()))) })
}

/// Adds a put.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_batch_put(
    batch: *const MainstayBatch,
    keyspace: *const MainstayKeyspace,
    key: *const u8,
    key_len: usize,
    value: *const u8,
    value_len: usize,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (batch, keyspace) = (handle(batch, "batch")?, handle(keyspace, "keyspace")?);
            let (key, value) = (input(key, key_len)?, input(value, value_len)?);
            batch.0.lock().unwrap_or_else(PoisonError::into_inner).insert(&keyspace.0, key, value);
        }
        Ok(())
    })
}

/// Adds a put for a time, in milliseconds from when the batch is applied, at least one. A keyspace that was not made for it
/// (`mainstay_keyspace_expiring`) is `MAINSTAY_INVALID` when the batch is committed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_batch_put_for(
    batch: *const MainstayBatch,
    keyspace: *const MainstayKeyspace,
    key: *const u8,
    key_len: usize,
    value: *const u8,
    value_len: usize,
    ttl_ms: u64,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (batch, keyspace) = (handle(batch, "batch")?, handle(keyspace, "keyspace")?);
            let (key, value) = (input(key, key_len)?, input(value, value_len)?);
            let ttl = Duration::from_millis(ttl_ms);
            batch.0.lock().unwrap_or_else(PoisonError::into_inner).insert_for(&keyspace.0, key, value, ttl);
        }
        Ok(())
    })
}

/// Adds a merge of an operand into the value of a key, absent or not, by the merge operator of the keyspace. An operand that the operator refuses, and
/// a keyspace without one, are `MAINSTAY_INVALID` when the batch is committed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_batch_merge(
    batch: *const MainstayBatch,
    keyspace: *const MainstayKeyspace,
    key: *const u8,
    key_len: usize,
    operand: *const u8,
    operand_len: usize,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (batch, keyspace) = (handle(batch, "batch")?, handle(keyspace, "keyspace")?);
            let (key, operand) = (input(key, key_len)?, input(operand, operand_len)?);
            batch.0.lock().unwrap_or_else(PoisonError::into_inner).merge(&keyspace.0, key, operand);
        }
        Ok(())
    })
}

/// Adds a delete.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_batch_delete(
    batch: *const MainstayBatch,
    keyspace: *const MainstayKeyspace,
    key: *const u8,
    key_len: usize,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (batch, keyspace) = (handle(batch, "batch")?, handle(keyspace, "keyspace")?);
            batch.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&keyspace.0, input(key, key_len)?);
        }
        Ok(())
    })
}

/// Adds the removal of all keys from `start` up to `end`, which is not among them, however many there are. An empty `start` is the first key
/// there can be. A null `end` with a length of 0 is none: all keys from `start` on; with another length it is `MAINSTAY_INVALID`. Bounds
/// that hold no key, an `end` of 0 bytes that is not null among them, are `MAINSTAY_INVALID` when the batch is committed. It takes what
/// was added before it, and nothing that is added later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_batch_delete_range(
    batch: *const MainstayBatch,
    keyspace: *const MainstayKeyspace,
    start: *const u8,
    start_len: usize,
    end: *const u8,
    end_len: usize,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (batch, keyspace) = (handle(batch, "batch")?, handle(keyspace, "keyspace")?);
            let start = Bound::Included(input(start, start_len)?);
            // A null that was to have bytes is a mistake, which must not remove everything.
            let upper = input(end, end_len)?;
            let end = if end.is_null() { Bound::Unbounded } else { Bound::Excluded(upper) };
            let mut batch = batch.0.lock().unwrap_or_else(PoisonError::into_inner);
            batch.remove_range::<&[u8]>(&keyspace.0, (start, end));
        }
        Ok(())
    })
}

/// Applies the batch all or none, durable on return, and empties it. On an error it keeps its mutations.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_batch_commit(
    store: *const MainstayStore,
    batch: *const MainstayBatch,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        let (store, batch) = unsafe { (handle(store, "store")?, handle(batch, "batch")?) };
        let mut batch = batch.0.lock().unwrap_or_else(PoisonError::into_inner);
        store.0.commit(batch.clone())?;
        batch.clear();
        Ok(())
    })
}

/// Frees a batch; what was not committed is dropped.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_batch_free(batch: *mut MainstayBatch) {
    // SAFETY: the caller frees a handle once.
    unsafe { free(batch) }
}
