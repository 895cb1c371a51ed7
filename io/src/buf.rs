//! Memory that may go to a device: aligned to the block size, owned by one side at a time.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;

/// The unit of every offset, length and address that reaches a device.
pub const BLOCK_BYTES: usize = 4096;

/// Exclusive memory of whole blocks, zeroed when made. [`AlignedBuf::freeze`] makes it shareable.
pub struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory alone; nothing about it is tied to a thread.
unsafe impl Send for AlignedBuf {}
// SAFETY: a shared reference only reads.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `blocks_bytes` zeroed bytes, rounded up to whole blocks.
    pub fn zeroed(bytes: usize) -> Self {
        let len = bytes.next_multiple_of(BLOCK_BYTES);
        if len == 0 {
            return Self { ptr: NonNull::dangling(), len: 0 };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout has a size above zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(layout) };
        Self { ptr, len }
    }

    /// A buffer that begins with `bytes`; the rest of the last block is zero.
    pub fn copy_from(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf[..bytes.len()].copy_from_slice(bytes);
        buf
    }

    /// Makes the memory shareable without copying it.
    pub fn freeze(self) -> AlignedBytes {
        let range = 0..self.len;
        AlignedBytes { buf: Arc::new(self), range }
    }

    /// Address for the kernel. Valid until the buffer is dropped.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, BLOCK_BYTES).expect("a buffer is smaller than half of the address space")
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `zeroed` with this very layout, and nobody else holds it.
            unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) }
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `len` initialised bytes (dangling and aligned for none) while `self` lives.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuf").field("len", &self.len).finish()
    }
}

/// Shared, immutable view of an aligned buffer. Cloning and slicing copy no byte.
#[derive(Clone)]
pub struct AlignedBytes {
    buf: Arc<AlignedBuf>,
    range: Range<usize>,
}

impl AlignedBytes {
    /// The part `range` of this view; both ends are multiples of [`BLOCK_BYTES`] when it goes to a device.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len(), "slice {range:?} of {} bytes", self.len());
        Self { buf: self.buf.clone(), range: self.range.start + range.start..self.range.start + range.end }
    }

    /// True when a device can take it: whole blocks at a multiple of [`BLOCK_BYTES`].
    pub(crate) fn is_aligned(&self) -> bool {
        self.is_empty() || self.len().is_multiple_of(BLOCK_BYTES) && self.as_ptr().addr().is_multiple_of(BLOCK_BYTES)
    }

    /// The same memory as [`Bytes`], for the network.
    pub fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buf[self.range.clone()]
    }
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<AlignedBytes> for Bytes {
    fn from(bytes: AlignedBytes) -> Self {
        bytes.into_bytes()
    }
}

impl fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBytes").field("len", &self.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_whole_aligned_zeroed_blocks() {
        for (bytes, len) in [(0, 0), (1, 4096), (4096, 4096), (4097, 8192)] {
            let mut buf = AlignedBuf::zeroed(bytes);
            assert_eq!((buf.len(), buf.iter().all(|b| *b == 0)), (len, true));
            assert!(buf.is_empty() || buf.as_ptr().addr().is_multiple_of(BLOCK_BYTES));
            buf.fill(1);
        }
        let buf = AlignedBuf::copy_from(b"abc");
        assert_eq!((&buf[..4], buf.len()), (&b"abc\0"[..], 4096));
    }

    #[test]
    fn sharing_and_slicing_copy_nothing() {
        let mut buf = AlignedBuf::zeroed(3 * BLOCK_BYTES);
        buf[BLOCK_BYTES] = 7;
        let at = buf.as_ptr().addr();
        let shared = buf.freeze();
        let part = shared.slice(BLOCK_BYTES..2 * BLOCK_BYTES).slice(0..BLOCK_BYTES);
        drop(shared);
        assert_eq!((part[0], part.as_ptr().addr(), part.is_aligned()), (7, at + BLOCK_BYTES, true));
        assert!(!part.slice(512..1024).is_aligned());
        let bytes = part.into_bytes();
        assert_eq!((bytes[0], bytes.len(), bytes.as_ptr().addr()), (7, BLOCK_BYTES, at + BLOCK_BYTES));
        let elsewhere = std::thread::spawn(move || bytes.slice(1..)[0]);
        assert_eq!(elsewhere.join().expect("no panic"), 0);
    }

    #[test]
    #[should_panic(expected = "slice 0..4097 of 4096 bytes")]
    fn a_slice_ends_inside() {
        drop(AlignedBuf::zeroed(1).freeze().slice(0..4097));
    }
}
