//! Entries: one version of a key each, with what leads to the older versions.
//!
//! # Format
//! In memory: a [`Head`], the key and the value. Before the head stand a [`Chain`] if there is an older version, and before that a `Bytes`
//! if the value is large: so the key, which every search wants, has one place.
//! # Invariants
//! E1. An entry is written once, before anything leads to it.
//! E2. Indexes fall along a chain. From an entry the version of any index is found in as many steps as the logarithm of the versions
//!     between: `jump` skips as far as in a skew binary list.
#![allow(unsafe_code, reason = "lengths that no type can hold")]

use std::marker::PhantomData;
use std::ptr::NonNull;

use bytes::Bytes;

use crate::arena::{Arena, Pages, Ref};
use crate::sync::Fixed;

/// What every entry begins with.
pub(crate) struct Head {
    index: Fixed<u64>,
    key_bytes: u32,
    /// Of an inline value; or, from [`SPECIAL`] on, what else there is.
    value_bytes: u32,
}

/// In `value_bytes`: of an inline operand its length is added to it; or it is one of those below.
const SPECIAL: u32 = 1 << 31;
const TOMBSTONE: u32 = u32::MAX;
const FAILED: u32 = u32::MAX - 1;
const LARGE: u32 = u32::MAX - 2;
const LARGE_OPERAND: u32 = u32::MAX - 3;
/// A value or operand of more than this many bytes stays a slice of what it came in; a smaller one is copied, so that it does not
/// keep the buffer of a whole batch in memory.
pub const INLINE_BYTES_MAX: usize = 4 << 10;

/// In `key_bytes`: a chain stands before the head.
const CHAINED: u32 = 1 << 31;

/// Older versions of the same key.
#[derive(Clone, Copy)]
struct Chain {
    older: Ref<Head>,
    jump: Ref<Head>,
    /// Versions before this one.
    depth: u64,
}

const _: () = assert!(
    INLINE_BYTES_MAX < (LARGE_OPERAND - SPECIAL) as usize,
    "the length of an inline operand is none of those above"
);
#[cfg(not(loom))]
const _: () = assert!(size_of::<Head>() == 16 && size_of::<Chain>() == 24);
/// Whatever of them stands before a head, all are aligned when the first is.
const _: () = assert!(align_of::<Head>() == 8 && align_of::<Chain>() == 8 && align_of::<Bytes>() == 8);
const _: () = assert!(size_of::<Bytes>().is_multiple_of(8) && size_of::<Chain>().is_multiple_of(8));

/// One version of a key, borrowed from the tree.
#[derive(Clone, Copy)]
pub struct Version<'a> {
    at: Ref<Head>,
    pages: PhantomData<&'a Pages>,
}

/// What a version says of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It has a value.
    Value,
    /// It was removed.
    Tombstone,
    /// An operand, to be merged into what is below.
    Operand,
    /// A merge was refused: it has neither a value nor an operand.
    Failed,
}

/// What is inserted.
#[derive(Clone, Copy, Debug)]
pub enum New<'a> {
    /// As [`Kind::Value`].
    Value(&'a Bytes),
    /// As [`Kind::Tombstone`].
    Tombstone,
    /// As [`Kind::Operand`].
    Operand(&'a Bytes),
    /// As [`Kind::Failed`].
    Failed,
}

/// What an entry is made of.
pub(crate) struct NewEntry<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) index: u64,
    pub(crate) new: New<'a>,
}

impl<'a> Version<'a> {
    /// The entry that was made in `pages` at `at`.
    #[inline]
    pub(crate) fn new(_pages: &'a Pages, at: Ref<Head>) -> Self {
        Self { at, pages: PhantomData }
    }

    pub(crate) fn at(self) -> Ref<Head> {
        self.at
    }

    #[inline]
    fn head(self) -> &'a Head {
        // SAFETY: it was written before anything led here (E1), and the pages live as long as 'a.
        unsafe { self.at.pointer().as_ref() }
    }

    /// The index at which it was written.
    #[inline]
    pub fn index(self) -> u64 {
        self.head().index.get()
    }

    fn is_chained(self) -> bool {
        self.head().key_bytes & CHAINED != 0
    }

    fn is_large(self) -> bool {
        matches!(self.head().value_bytes, LARGE | LARGE_OPERAND)
    }

    fn chain(self) -> Option<Chain> {
        // SAFETY: a chain stands before the head of an entry that says so, and was written with it.
        self.is_chained().then(|| unsafe { self.at.pointer().cast::<Chain>().sub(1).read() })
    }

    fn large(self) -> Option<&'a Bytes> {
        let chain_bytes = if self.is_chained() { size_of::<Chain>() } else { 0 };
        // SAFETY: an entry that says so has it there, written with it, and it is dropped with the pages.
        self.is_large().then(|| unsafe { self.at.pointer().byte_sub(chain_bytes).cast::<Bytes>().sub(1).as_ref() })
    }

    #[inline]
    fn key_place(self) -> NonNull<u8> {
        // SAFETY: inside of the entry, or at its end, and the pointer is that of the whole page.
        unsafe { self.at.pointer().add(1).cast() }
    }

    #[inline]
    fn key_bytes(self) -> usize {
        (self.head().key_bytes & !CHAINED) as usize
    }

    /// The key.
    #[inline]
    pub fn key(self) -> &'a [u8] {
        // SAFETY: so many bytes were written there with the entry, and live as long as 'a.
        unsafe { std::slice::from_raw_parts(self.key_place().as_ptr(), self.key_bytes()) }
    }

    /// What it says of its key.
    #[inline]
    pub fn kind(self) -> Kind {
        match self.head().value_bytes {
            ..SPECIAL | LARGE => Kind::Value,
            TOMBSTONE => Kind::Tombstone,
            FAILED => Kind::Failed,
            _ => Kind::Operand,
        }
    }

    /// The value or operand, borrowed; `None` where there is neither.
    #[inline]
    pub fn value_part(self) -> Option<&'a [u8]> {
        let value_bytes = match self.head().value_bytes {
            value_bytes @ ..SPECIAL => value_bytes,
            TOMBSTONE | FAILED => return None,
            LARGE | LARGE_OPERAND => return self.large().map(AsRef::as_ref),
            operand_bytes => operand_bytes - SPECIAL,
        };
        // SAFETY: the value stands behind the key.
        let place = unsafe { self.key_place().add(self.key_bytes()) };
        // SAFETY: so many bytes were written there with the entry, and live as long as 'a.
        Some(unsafe { std::slice::from_raw_parts(place.as_ptr(), value_bytes as usize) })
    }

    /// The value or operand; `None` where there is neither. A large one is shared, a small one copied, so that it keeps no page in memory.
    #[inline]
    pub fn value(self) -> Option<Bytes> {
        match self.large() {
            Some(large) => Some(large.clone()),
            None => self.value_part().map(Bytes::copy_from_slice),
        }
    }

    /// The newest version of the key with an index of at most `at`.
    #[inline]
    pub(crate) fn visible(self, at: u64) -> Option<Self> {
        if self.index() <= at { Some(self) } else { self.older(at) }
    }

    fn older(self, at: u64) -> Option<Self> {
        let mut version = self;
        while version.index() > at {
            version = version.toward(at)?;
        }
        Some(version)
    }

    /// From a version above `at` the next one on the way to it; None when there is none before, or no need.
    pub(crate) fn toward(self, at: u64) -> Option<Self> {
        let chain = self.chain().filter(|_| self.index() > at)?;
        let jump = Self { at: chain.jump, pages: PhantomData };
        Some(if jump.index() > at { jump } else { Self { at: chain.older, pages: PhantomData } })
    }

    /// The version before this one.
    pub(crate) fn before(self) -> Option<Self> {
        self.chain().map(|chain| Self { at: chain.older, pages: PhantomData })
    }

    /// Depth, and where the jump leads: an oldest version jumps to itself.
    fn jump(self) -> (u64, Self) {
        self.chain().map_or((0, self), |chain| (chain.depth, Self { at: chain.jump, pages: PhantomData }))
    }

    fn chain_to(self) -> Chain {
        let (depth, jump) = self.jump();
        let (jump_depth, jump_jump) = jump.jump();
        let far = depth - jump_depth == jump_depth - jump_jump.jump().0;
        Chain { older: self.at, jump: if far { jump_jump.at } else { self.at }, depth: depth + 1 }
    }
}

impl<'a> From<Option<&'a Bytes>> for New<'a> {
    fn from(value: Option<&'a Bytes>) -> Self {
        value.map_or(Self::Tombstone, Self::Value)
    }
}

impl NewEntry<'_> {
    /// Writes it into the pages. `older` is the version of the same key that comes before it.
    pub(crate) fn write(&self, arena: &mut Arena, pages: &Pages, older: Option<Version<'_>>) -> Ref<Head> {
        let (value_bytes, inline, large) = match self.new {
            New::Tombstone => (TOMBSTONE, &[][..], None),
            New::Failed => (FAILED, &[][..], None),
            New::Value(value) if value.len() > INLINE_BYTES_MAX => (LARGE, &[][..], Some(value)),
            New::Value(value) => (value.len() as u32, &value[..], None),
            New::Operand(operand) if operand.len() > INLINE_BYTES_MAX => (LARGE_OPERAND, &[][..], Some(operand)),
            New::Operand(operand) => (SPECIAL + operand.len() as u32, &operand[..], None),
        };
        assert!(self.key.len() < CHAINED as usize, "key_bytes={}", self.key.len());
        let chained = if older.is_some() { CHAINED } else { 0 };
        let head = Head { index: Fixed::new(self.index), key_bytes: self.key.len() as u32 | chained, value_bytes };
        let large_bytes = if large.is_some() { size_of::<Bytes>() } else { 0 };
        let chain_bytes = if older.is_some() { size_of::<Chain>() } else { 0 };
        let bytes = large_bytes + chain_bytes + size_of::<Head>() + self.key.len() + inline.len();
        let start = arena.entry::<Head>(pages, bytes);
        if let Some(large) = large {
            // SAFETY: so many free bytes begin at `start`, aligned for a head and so for each part, by the assertions above.
            unsafe { start.cast::<Bytes>().write(large.clone()) };
            arena.keep(pages, start.cast(), large.len());
        }
        // SAFETY: inside of the entry.
        let place = unsafe { start.add(large_bytes) };
        if let Some(older) = older {
            // SAFETY: as the first one.
            unsafe { place.cast::<Chain>().write(older.chain_to()) };
        }
        // SAFETY: inside of the entry.
        let at = unsafe { place.add(chain_bytes) }.cast::<Head>();
        // SAFETY: as the first one.
        unsafe { at.write(head) };
        // SAFETY: inside of the entry, or at its end.
        let place = unsafe { at.add(1) }.cast::<u8>();
        // SAFETY: free memory as long as the key, which lies elsewhere.
        unsafe { place.copy_from_nonoverlapping(NonNull::from(self.key).cast(), self.key.len()) };
        // SAFETY: inside of the entry, or at its end.
        let place = unsafe { place.add(self.key.len()) };
        // SAFETY: free memory as long as the value, which lies elsewhere.
        unsafe { place.copy_from_nonoverlapping(NonNull::from(inline).cast(), inline.len()) };
        Ref::made(at)
    }
}
