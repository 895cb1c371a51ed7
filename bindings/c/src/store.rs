//! Stores, keyspaces, checkpoints and clones.

use std::ffi::c_char;

use facade::{BackendChoice, CompactionStyle, Keyspace, KeyspaceOptions, OperatorId, Store, TableCompression};

use crate::bytes::{free, handle, input, put_handle, put_value, text};
use crate::{Failure, MainstayBytes, MainstayCode, guard};

/// An open store.
pub struct MainstayStore(pub(crate) Store);

/// A keyspace of a store.
pub struct MainstayKeyspace(pub(crate) Keyspace);

/// How to open a store. Zero in a field is its default.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(clippy::exhaustive_structs, reason = "a C struct is its fields")]
pub struct MainstayOptions {
    /// Bytes for memtables, caches and buffers together.
    pub memory_bytes: u64,
    /// Bytes of the log of a new volume.
    pub wal_bytes: u64,
    /// Block I/O: 0 io_uring where it works, 1 io_uring or an error, 2 threads.
    pub backend: u32,
}

/// What a keyspace may have otherwise than its store. Zero in a field is its default.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(clippy::exhaustive_structs, reason = "a C struct is its fields")]
pub struct MainstayKeyspaceOptions {
    /// How blocks are compressed: 0 as in the store, 1 not at all, 2 lz4, 3 lz4 above the last level and zstd on it.
    pub compression: u32,
    /// Bytes of a block of data before it is compressed, 1 KiB to 256 KiB.
    pub block_bytes: u32,
    /// 0 for leveled compaction; 2 to 64 for tiered, with so many sorted runs at most.
    pub tiered_runs: u32,
}

impl MainstayKeyspaceOptions {
    fn checked(&self) -> Result<KeyspaceOptions, Failure> {
        let mut options = KeyspaceOptions::new();
        options = match self.compression {
            0 => options,
            1 => options.compression(TableCompression::None),
            2 => options.compression(TableCompression::Lz4),
            3 => options.compression(TableCompression::ByLevel),
            other => return Err(Failure::invalid(format!("no such compression compression={other} max=3"))),
        };
        if self.block_bytes > 0 {
            options = options.block_bytes(self.block_bytes);
        }
        if self.tiered_runs > 0 {
            // What is too large for it is out of range as well.
            options =
                options.compaction(CompactionStyle::Tiered { runs: u8::try_from(self.tiered_runs).unwrap_or(u8::MAX) });
        }
        Ok(options)
    }
}

/// Opens the store at `path`, a directory (made if absent) or a block device. `options` may be null. The store is freed with
/// `mainstay_close`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_open(
    path: *const c_char,
    options: *const MainstayOptions,
    out: *mut *mut MainstayStore,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        let (path, options) = unsafe { (text(path, "path")?, options.as_ref().copied().unwrap_or_default()) };
        let mut builder = Store::builder();
        if options.memory_bytes > 0 {
            builder = builder.memory_bytes(options.memory_bytes);
        }
        if options.wal_bytes > 0 {
            builder = builder.wal_bytes(options.wal_bytes);
        }
        builder = builder.backend(match options.backend {
            0 => BackendChoice::Auto,
            1 => BackendChoice::Uring,
            2 => BackendChoice::Threads,
            other => return Err(Failure::invalid(format!("unknown backend={other}"))),
        });
        // SAFETY: the caller's arguments, as the header states them.
        unsafe { put_handle(out, || Ok(MainstayStore(builder.open(path)?))) }
    })
}

/// Flushes, marks the volume clean and frees the store. Free keyspaces, snapshots and iterators first. Also after an error the
/// handle is freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_close(store: *mut MainstayStore) -> MainstayCode {
    guard(|| {
        if store.is_null() {
            return Ok(());
        }
        // SAFETY: not null, made by `Box::into_raw`, and freed once by contract.
        let store = unsafe { Box::from_raw(store) };
        Ok(store.0.close()?)
    })
}

/// Gives the caller the keyspace that `open` finds or makes.
///
/// # Safety
/// As of the function that calls it: `store` is null or open, `name` null or a string, `out` null or writable.
unsafe fn open_keyspace(
    store: *const MainstayStore,
    name: *const c_char,
    out: *mut *mut MainstayKeyspace,
    open: impl FnOnce(&Store, &str) -> Result<Keyspace, Failure>,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the contract of this function.
        unsafe {
            let (store, name) = (handle(store, "store")?, text(name, "name")?);
            put_handle(out, || Ok(MainstayKeyspace(open(&store.0, name)?)))
        }
    })
}

/// Opens a keyspace, made if it is absent. Freed with `mainstay_keyspace_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_keyspace(
    store: *const MainstayStore,
    name: *const c_char,
    out: *mut *mut MainstayKeyspace,
) -> MainstayCode {
    // SAFETY: the caller's arguments, as the header states them.
    unsafe { open_keyspace(store, name, out, |store, name| Ok(store.keyspace(name)?)) }
}

/// Opens a keyspace with a merge operator, made if it is absent, and given the operator if it has none. `mainstay.u64_add` version 1 adds
/// numbers of 8 bytes little-endian and stays at the largest; `mainstay.append` version 1 appends. Others, and a keyspace that has
/// another one, are `MAINSTAY_INVALID`. Freed with `mainstay_keyspace_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_keyspace_with_operator(
    store: *const MainstayStore,
    name: *const c_char,
    operator_name: *const c_char,
    version: u32,
    out: *mut *mut MainstayKeyspace,
) -> MainstayCode {
    let open = |store: &Store, name: &str| {
        // SAFETY: the caller's argument, as the header states it.
        let operator = OperatorId::new(unsafe { text(operator_name, "operator_name")? }.to_owned(), version);
        Ok(store.keyspace_with_operator(name, operator)?)
    };
    // SAFETY: the caller's arguments, as the header states them.
    unsafe { open_keyspace(store, name, out, open) }
}

/// Opens a keyspace whose pairs can expire, made if it is absent. One that was not made so is `MAINSTAY_INVALID`. Freed with `mainstay_keyspace_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_keyspace_expiring(
    store: *const MainstayStore,
    name: *const c_char,
    out: *mut *mut MainstayKeyspace,
) -> MainstayCode {
    // SAFETY: the caller's arguments, as the header states them.
    unsafe { open_keyspace(store, name, out, |store, name| Ok(store.keyspace_expiring(name)?)) }
}

/// Opens a keyspace with these options in place of all that it had, made if it is absent. What is out of range is `MAINSTAY_INVALID`. Freed with
/// `mainstay_keyspace_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_keyspace_with_options(
    store: *const MainstayStore,
    name: *const c_char,
    options: *const MainstayKeyspaceOptions,
    out: *mut *mut MainstayKeyspace,
) -> MainstayCode {
    let open = |store: &Store, name: &str| {
        // SAFETY: the caller's argument, as the header states it.
        let options = unsafe { handle(options, "options")? }.checked()?;
        Ok(store.keyspace_with_options(name, options)?)
    };
    // SAFETY: the caller's arguments, as the header states them.
    unsafe { open_keyspace(store, name, out, open) }
}

/// Frees a keyspace handle; its data stays.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_keyspace_free(keyspace: *mut MainstayKeyspace) {
    // SAFETY: the caller frees a handle once.
    unsafe { free(keyspace) }
}

/// Sets a key, durable on return. The key has 1 byte to 64 KiB, the value at most 16 MiB.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_put(
    keyspace: *const MainstayKeyspace,
    key: *const u8,
    key_len: usize,
    value: *const u8,
    value_len: usize,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            handle(keyspace, "keyspace")?.0.insert(input(key, key_len)?, input(value, value_len)?)?;
        }
        Ok(())
    })
}

/// Reads a key. `MAINSTAY_NOT_FOUND` if it is absent. Give `out` back with `mainstay_bytes_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_get(
    keyspace: *const MainstayKeyspace,
    key: *const u8,
    key_len: usize,
    out: *mut MainstayBytes,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (keyspace, key) = (handle(keyspace, "keyspace")?, input(key, key_len)?);
            put_value(out, || Ok(keyspace.0.get(key)?))
        }
    })
}

/// Removes a key, durable on return; nothing if it is absent.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_delete(
    keyspace: *const MainstayKeyspace,
    key: *const u8,
    key_len: usize,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            handle(keyspace, "keyspace")?.0.remove(input(key, key_len)?)?;
        }
        Ok(())
    })
}

/// Freezes the store under a name: durable, and no data is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_checkpoint_create(store: *const MainstayStore, name: *const c_char) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            handle(store, "store")?.0.checkpoint(text(name, "name")?)?;
        }
        Ok(())
    })
}

/// Drops a checkpoint. Clones made from it stay.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_checkpoint_drop(store: *const MainstayStore, name: *const c_char) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            handle(store, "store")?.0.drop_checkpoint(text(name, "name")?)?;
        }
        Ok(())
    })
}

/// Makes a writable store from a checkpoint, without copying data. Freed with `mainstay_store_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_clone_create(
    store: *const MainstayStore,
    name: *const c_char,
    checkpoint: *const c_char,
    out: *mut *mut MainstayStore,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let store = handle(store, "store")?;
            let (name, checkpoint) = (text(name, "name")?, text(checkpoint, "checkpoint")?);
            put_handle(out, || Ok(MainstayStore(store.0.create_clone(name, checkpoint)?)))
        }
    })
}

/// Opens a clone by its name. Freed with `mainstay_store_free`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_clone_open(
    store: *const MainstayStore,
    name: *const c_char,
    out: *mut *mut MainstayStore,
) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            let (store, name) = (handle(store, "store")?, text(name, "name")?);
            put_handle(out, || Ok(MainstayStore(store.0.open_clone(name)?)))
        }
    })
}

/// Drops a clone and its data.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_clone_drop(store: *const MainstayStore, name: *const c_char) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller's arguments, as the header states them.
        unsafe {
            handle(store, "store")?.0.drop_clone(text(name, "name")?)?;
        }
        Ok(())
    })
}

/// Frees the handle of a clone; the clone stays. The store itself is freed by `mainstay_close`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_store_free(store: *mut MainstayStore) {
    // SAFETY: the caller frees a handle once.
    unsafe { free(store) }
}
