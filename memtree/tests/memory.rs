//! What a tree says that it holds is what it took from the allocator, to the byte.
#![allow(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use bytes::Bytes;
use mainstay_memtree::{New, Writer};

struct Counting;

thread_local! {
    /// What this thread took and has not given back.
    static HELD: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    HELD.set(HELD.get() + bytes);
}

// SAFETY: the system's allocator does everything.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn bytes_are_those_that_the_allocator_gave() {
    let large = Bytes::from(vec![7; 5000]);
    let small = large.slice(..100);
    // Shared from here on, which is when `Bytes` allocates for it.
    let before = HELD.get();
    let mut writer = Writer::new();
    let reader = writer.reader();
    let mut large_bytes = 0;
    for at in 0..if cfg!(miri) { 300 } else { 30_000u64 } {
        let key = at.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        let value = if at % 10 == 0 { &large } else { &small };
        large_bytes += if at % 10 == 0 { large.len() as i64 } else { 0 };
        let new = if at % 4 == 0 { New::Operand(value) } else { New::Value(value) };
        writer.insert_new(&key, at, new);
        if at % 3 == 0 {
            writer.insert_new(&key, at + 1, if at % 2 == 0 { New::Failed } else { New::Tombstone });
        }
        if at % 100 == 0 {
            assert_eq!(HELD.get() - before, writer.bytes() as i64 - large_bytes, "after {at} keys");
        }
    }
    drop(writer);
    assert!(HELD.get() > before, "a reader keeps the tree");
    drop(reader);
    assert_eq!(HELD.get(), before);
    assert!(!large.is_unique(), "`small` is left");
    drop(small);
    assert!(large.is_unique());
}
