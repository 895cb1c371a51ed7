//! Byte strings in both directions.

use std::ffi::{CStr, c_char};
use std::slice;

use crate::{Failure, MainstayCode, guard};

/// Bytes that the library lends until [`mainstay_bytes_free`]; `data` is null for none.
#[repr(C)]
#[derive(Debug)]
#[allow(clippy::exhaustive_structs, reason = "a C struct is its fields")]
pub struct MainstayBytes {
    /// The first byte.
    pub data: *const u8,
    /// How many there are.
    pub len: usize,
    /// For the library.
    pub owner: *mut MainstayOwner,
}

/// Keeps borrowed bytes alive.
pub struct MainstayOwner(#[allow(dead_code, reason = "held, not read")] facade::Value);

impl MainstayBytes {
    pub(crate) fn none() -> Self {
        Self { data: std::ptr::null(), len: 0, owner: std::ptr::null_mut() }
    }

    pub(crate) fn lend(value: facade::Value) -> Self {
        let (data, len) = (value.as_ptr(), value.len());
        Self { data, len, owner: Box::into_raw(Box::new(MainstayOwner(value))) }
    }
}

/// Gives bytes back. `bytes` may be null or already given back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mainstay_bytes_free(bytes: *mut MainstayBytes) -> MainstayCode {
    guard(|| {
        // SAFETY: the caller passes null or a struct that this library filled.
        let Some(bytes) = (unsafe { bytes.as_mut() }) else { return Ok(()) };
        if !bytes.owner.is_null() {
            // SAFETY: made by `Box::into_raw` in `lend`; set to null right below, so it is freed once.
            drop(unsafe { Box::from_raw(bytes.owner) });
        }
        *bytes = MainstayBytes::none();
        Ok(())
    })
}

/// Borrows the caller's bytes for the length of a call.
///
/// # Safety
/// `data` points to `len` readable bytes that outlive the use, or is null.
pub(crate) unsafe fn input<'a>(data: *const u8, len: usize) -> Result<&'a [u8], Failure> {
    if data.is_null() {
        return if len == 0 { Ok(&[]) } else { Err(Failure::invalid(format!("null data with length={len}"))) };
    }
    // SAFETY: the contract of this function.
    Ok(unsafe { slice::from_raw_parts(data, len) })
}

/// Borrows the caller's zero-terminated UTF-8 text.
///
/// # Safety
/// `text` is null or points to bytes that end with a zero and outlive the use.
pub(crate) unsafe fn text<'a>(text: *const c_char, what: &str) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(Failure::invalid(format!("null {what}")));
    }
    // SAFETY: not null, and the contract of this function.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| Failure::invalid(format!("{what} is not UTF-8")))
}

/// Borrows a handle.
///
/// # Safety
/// `handle` is null or a handle of this library that has not been freed.
pub(crate) unsafe fn handle<'a, T>(handle: *const T, what: &str) -> Result<&'a T, Failure> {
    // SAFETY: the contract of this function.
    unsafe { handle.as_ref() }.ok_or_else(|| Failure::invalid(format!("null {what}")))
}

/// Writes a result where the caller asked for it.
///
/// # Safety
/// `out` is null or points to writable memory for a `T`; what it held is not dropped.
pub(crate) unsafe fn put_out<T>(out: *mut T, value: T) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::invalid("null out pointer"));
    }
    // SAFETY: not null, and the contract of this function.
    unsafe { out.write(value) };
    Ok(())
}

/// Makes a handle and gives it to the caller, who frees it with [`free`]. Nothing is made where `out` is null: nobody could free it.
///
/// # Safety
/// As for [`put_out`].
pub(crate) unsafe fn put_handle<T>(out: *mut *mut T, make: impl FnOnce() -> Result<T, Failure>) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::invalid("null out pointer"));
    }
    // SAFETY: the contract of this function.
    unsafe { put_out(out, Box::into_raw(Box::new(make()?))) }
}

/// Lends the caller the value that `read` finds; an absent one is `MAINSTAY_NOT_FOUND`. Nothing is read where `out` is null.
///
/// # Safety
/// As for [`put_out`].
pub(crate) unsafe fn put_value(
    out: *mut MainstayBytes,
    read: impl FnOnce() -> Result<Option<facade::Value>, Failure>,
) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::invalid("null out pointer"));
    }
    let value = read()?.ok_or_else(|| Failure::not_found("the key is absent"))?;
    // SAFETY: the contract of this function.
    unsafe { put_out(out, MainstayBytes::lend(value)) }
}

/// Frees a handle made by `Box::into_raw`.
///
/// # Safety
/// `handle` is null or was made by `Box::into_raw` and is freed once.
pub(crate) unsafe fn free<T>(handle: *mut T) {
    if !handle.is_null() {
        // A destructor that panics is stopped like any other body.
        let _ = guard(|| {
            // SAFETY: the contract of this function.
            drop(unsafe { Box::from_raw(handle) });
            Ok(())
        });
    }
}
