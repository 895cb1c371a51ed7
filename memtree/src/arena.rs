//! Pages of memory for the nodes and the entries of one tree: taken as it grows, given back together when its last handle goes.
//!
//! # Invariants
//! A1. What was made in a page stays where it is, and is not written again but through its atomics, as long as [`Pages`] live.
//! A2. A [`Ref`] is used with the pages that it was made in. Those of one tree never reach another: only the writer makes them,
//!     and only atomics of the same tree hold them.
//! A3. Entries are laid from the low end of a page and nodes from the high end, so that nodes fill whole lines of the cache.
//! A4. [`Ref::cast`] names what was made there: the slot of a leaf leads to an entry, that of an inner node at level 1 to a leaf, above to
//!     an inner node.
#![allow(unsafe_code, reason = "memory that outlives every borrow that the compiler can see")]

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

use crate::sync::{AtomicPtr, Ordering};

/// The first page, doubled up to the largest: most memtables of a node with many groups stay small.
const PAGE_BYTES_MIN: usize = 4 << 10;
const PAGE_BYTES_MAX: usize = 256 << 10;
/// Two lines of the cache, which processors fetch together.
const PAGE_ALIGN: usize = 128;

/// A place in the pages of a tree.
pub(crate) struct Ref<T>(NonNull<T>);

impl<T> Clone for Ref<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Ref<T> {}

impl<T> PartialEq for Ref<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

// SAFETY: a `Ref` gives nothing but shared references, and those only together with the pages.
unsafe impl<T: Sync> Send for Ref<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Ref<T> {}

impl<T> Ref<T> {
    /// To what was just made, in memory that [`Arena::entry`] gave.
    pub(crate) fn made(at: NonNull<T>) -> Self {
        Self(at)
    }

    pub(crate) fn pointer(self) -> NonNull<T> {
        self.0
    }

    /// The same place as what was made there (A4).
    pub(crate) fn cast<U>(self) -> Ref<U> {
        Ref(self.0.cast())
    }
}

/// A [`Ref`], or none yet, that the writer sets and readers load.
#[derive(Debug)]
pub(crate) struct AtomicRef<T>(AtomicPtr<T>);

impl<T> AtomicRef<T> {
    pub(crate) fn new(to: Option<Ref<T>>) -> Self {
        Self(AtomicPtr::new(to.map_or(std::ptr::null_mut(), |to| to.0.as_ptr())))
    }

    #[inline]
    pub(crate) fn load(&self, order: Ordering) -> Option<Ref<T>> {
        NonNull::new(self.0.load(order)).map(Ref)
    }

    pub(crate) fn store(&self, to: Ref<T>, order: Ordering) {
        self.0.store(to.0.as_ptr(), order);
    }
}

struct Page {
    at: NonNull<u8>,
    layout: Layout,
}

/// The memory of one tree.
pub(crate) struct Pages {
    /// Locked by the writer for each new page and each large value, never by readers.
    held: Mutex<Held>,
}

#[derive(Default)]
struct Held {
    pages: Vec<Page>,
    /// Values that are not copied: they lie in entries, and are let go with the pages.
    large: Vec<NonNull<Bytes>>,
}

// SAFETY: pages are plain memory that nobody owns but this; `Bytes` may be dropped by any thread.
unsafe impl Send for Held {}

impl Pages {
    pub(crate) fn new() -> Self {
        Self { held: Mutex::default() }
    }

    /// What was made at `at`.
    #[inline]
    pub(crate) fn get<T>(&self, at: Ref<T>) -> &T {
        // SAFETY: `at` was made as a `T` (A4) in these pages (A2), which live as long as the borrow of them; nothing of it is written
        // again but atomics (A1). Whoever has it has loaded it with acquire, or after something that was, so it sees it whole.
        unsafe { at.0.as_ref() }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        // Every change is a push.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let held = self.held.get_mut().unwrap_or_else(PoisonError::into_inner);
        for large in held.large.drain(..) {
            // SAFETY: it was written when its entry was made, lies in a page that is not freed yet, and nobody reads it now.
            unsafe { large.drop_in_place() };
        }
        for page in held.pages.drain(..) {
            // SAFETY: allocated with this layout, and freed once.
            unsafe { dealloc(page.at.as_ptr(), page.layout) };
        }
    }
}

/// Where the writer makes what it adds.
pub(crate) struct Arena {
    page: NonNull<u8>,
    /// The free part of the page.
    low: usize,
    high: usize,
    next_bytes: usize,
    bytes: u64,
}

// SAFETY: it points to the free part of a page, which nobody else touches.
unsafe impl Send for Arena {}

impl Arena {
    pub(crate) fn new() -> Self {
        Self { page: NonNull::dangling(), low: 0, high: 0, next_bytes: PAGE_BYTES_MIN, bytes: 0 }
    }

    /// Bytes taken from the allocator, and those of large values.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes a node.
    pub(crate) fn node<T>(&mut self, pages: &Pages, node: T) -> Ref<T> {
        const { assert!(align_of::<T>() <= PAGE_ALIGN && !std::mem::needs_drop::<T>()) };
        let (bytes, align) = (size_of::<T>(), align_of::<T>());
        let down = |high: usize| high.checked_sub(bytes).map(|at| at & !(align - 1));
        let at = match down(self.high).filter(|at| self.low <= *at) {
            Some(at) => at,
            None => {
                self.turn(pages, bytes + align);
                down(self.high).expect("a new page has room")
            }
        };
        self.high = at;
        // SAFETY: `at` is inside of the page.
        let place = unsafe { self.page.add(at) }.cast::<T>();
        // SAFETY: free memory of the page, as long and as aligned as `T` needs: the page is aligned to more.
        unsafe { place.write(node) };
        Ref(place)
    }

    /// Free memory for an entry of `bytes` bytes, aligned for a `T`.
    pub(crate) fn entry<T>(&mut self, pages: &Pages, bytes: usize) -> NonNull<u8> {
        const { assert!(align_of::<T>() <= PAGE_ALIGN) };
        let up = |low: usize| low.next_multiple_of(align_of::<T>());
        if up(self.low).checked_add(bytes).is_none_or(|end| end > self.high) {
            self.turn(pages, bytes);
        }
        let at = up(self.low);
        self.low = at + bytes;
        // SAFETY: `at` is inside of the page.
        unsafe { self.page.add(at) }
    }

    /// Lets the pages drop what was written at `large`, and counts it.
    pub(crate) fn keep(&mut self, pages: &Pages, large: NonNull<Bytes>, bytes: usize) {
        let list = &mut pages.held().large;
        let before = list.capacity();
        list.push(large);
        self.bytes += bytes as u64 + ((list.capacity() - before) * size_of::<NonNull<Bytes>>()) as u64;
    }

    /// Goes on in a new page with room for `bytes`.
    #[cold]
    fn turn(&mut self, pages: &Pages, bytes: usize) {
        let length = self.next_bytes.max(bytes.next_multiple_of(PAGE_ALIGN));
        self.next_bytes = (self.next_bytes * 2).min(PAGE_BYTES_MAX);
        let layout = Layout::from_size_align(length, PAGE_ALIGN).expect("entries are shorter than half of all memory");
        // SAFETY: the layout is not empty.
        let page = unsafe { alloc(layout) };
        let Some(page) = NonNull::new(page) else { handle_alloc_error(layout) };
        let list = &mut pages.held().pages;
        let before = list.capacity();
        list.push(Page { at: page, layout });
        self.bytes += length as u64 + ((list.capacity() - before) * size_of::<Page>()) as u64;
        (self.page, self.low, self.high) = (page, 0, length);
    }
}
