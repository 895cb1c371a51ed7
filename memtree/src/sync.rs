//! The atomics of the tree: the standard ones, or loom's where loom runs every order of them (`cfg(loom)`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// A value that is set where it is made and read by others once they have found it: a plain one, and for loom one that finds
/// readers who are not behind the writer.
#[derive(Debug)]
pub(crate) struct Fixed<T> {
    #[cfg(not(loom))]
    value: T,
    #[cfg(loom)]
    value: loom::cell::UnsafeCell<T>,
}

impl<T: Copy> Fixed<T> {
    #[cfg(not(loom))]
    pub(crate) fn new(value: T) -> Self {
        Self { value }
    }

    #[cfg(not(loom))]
    #[inline]
    pub(crate) fn get(&self) -> T {
        self.value
    }

    #[cfg(loom)]
    pub(crate) fn new(value: T) -> Self {
        Self { value: loom::cell::UnsafeCell::new(value) }
    }

    #[cfg(loom)]
    #[allow(unsafe_code, reason = "loom gives a pointer")]
    pub(crate) fn get(&self) -> T {
        // SAFETY: nobody has a mutable reference to the value, and loom ends the run when somebody writes it meanwhile.
        self.value.with(|value| unsafe { *value })
    }
}
