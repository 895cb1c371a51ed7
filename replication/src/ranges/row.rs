//! What a group says of a range of keys: that it holds it, gives it away, gave it away or takes it.
//!
//! # Place
//! pure: values and their bytes, and what the rows of all groups say together
//! # Format
//! docs/format.md, "Ranges"
//! # Invariants
//! - S1. The rows of one group never overlap.
//! - S2. At most one group says `Held` or `Leaving` of a key.
//! - S3. The mover's number is drawn for one attempt: with it a row says exactly one thing, whenever it is compared.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::wire::{Reader, Writer};
use crate::{Error, ErrorKind, Result};

const HELD: u8 = 1;
const LEAVING: u8 = 2;
const LEFT: u8 = 3;
const ARRIVING: u8 = 4;
/// What the key of a birth begins with, where that of a row has the length of a name.
const BIRTH: u8 = 0;
/// Behind all births: the length of the shortest name.
const BIRTH_END: u8 = 1;
/// What the key of a shape begins with; no name is that long.
const SHAPE: u8 = u8::MAX;

/// The state of a range in one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It answers reads and writes.
    Held,
    /// It answers reads: a mover copies it to another group.
    Leaving { to: String, mover: u64 },
    /// Another group has it. What is left of its keys is being deleted.
    Left { to: String, mover: u64 },
    /// A mover fills it.
    Arriving { from: String, mover: u64 },
}

/// A range in one group: the keys from `first` to before `end`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) first: Bytes,
    /// None for no end.
    pub(crate) end: Option<Bytes>,
    pub(crate) state: State,
}

/// Where the row of a range lies: the keyspace's name with its length (1), then the first key.
pub(crate) fn row_key(name: &str, first: &[u8]) -> Bytes {
    let mut key = Vec::with_capacity(name.len().saturating_add(first.len()).saturating_add(1));
    key.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
    key.extend_from_slice(name.as_bytes());
    key.extend_from_slice(first);
    key.into()
}

/// Where it is written that a keyspace was placed, so that it is born once.
pub(crate) fn birth_key(name: &str) -> Bytes {
    [&[BIRTH], name.as_bytes()].concat().into()
}

/// What all births lie between.
pub(crate) fn births() -> (Bytes, Bytes) {
    (Bytes::from_static(&[BIRTH]), Bytes::from_static(&[BIRTH_END]))
}

/// The name of the keyspace whose birth is written at a key.
pub(crate) fn name_of_birth(key: &Bytes) -> Result<String> {
    let name = key.strip_prefix(&[BIRTH]).and_then(|name| std::str::from_utf8(name).ok());
    let name = name.ok_or_else(|| Error::new(ErrorKind::Corrupt, "a placed keyspace has no name in its birth"))?;
    Ok(name.to_owned())
}

/// Where a group keeps a number that is drawn anew whenever there are other rows of a keyspace than before.
pub(crate) fn shape_key(name: &str) -> Bytes {
    [&[SHAPE], name.as_bytes()].concat().into()
}

impl Row {
    pub(crate) fn held(first: Bytes, end: Option<Bytes>) -> Self {
        Self { first, end, state: State::Held }
    }

    pub(crate) fn with(&self, state: State) -> Self {
        Self { state, ..self.clone() }
    }

    pub(crate) fn covers(&self, key: &[u8]) -> bool {
        self.first <= key && self.end.as_ref().is_none_or(|end| key < end)
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let before = |end: &Option<Bytes>, first: &Bytes| end.as_ref().is_some_and(|end| end <= first);
        !before(&self.end, &other.first) && !before(&other.end, &self.first)
    }

    /// True when reads are answered by it.
    pub(crate) fn serves(&self) -> bool {
        matches!(self.state, State::Held | State::Leaving { .. })
    }

    /// The value of the row; its first key is in the key.
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = Writer::with_capacity(64);
        let (tag, group, mover) = match &self.state {
            State::Held => (HELD, "", 0),
            State::Leaving { to, mover } => (LEAVING, to.as_str(), *mover),
            State::Left { to, mover } => (LEFT, to.as_str(), *mover),
            State::Arriving { from, mover } => (ARRIVING, from.as_str(), *mover),
        };
        out.u8(tag).string(group).u64(mover).option(self.end.as_ref(), |out, end| {
            out.bytes(end);
        });
        out.finish()
    }

    /// The row of a keyspace's name at a key of [`row_key`].
    pub(crate) fn decode(name: &str, key: &Bytes, value: &Bytes) -> Result<Self> {
        let mut reader = Reader::open(value)?;
        let tag = reader.u8()?;
        let (group, mover) = (reader.string()?, reader.u64()?);
        let end = reader.option(Reader::bytes)?;
        reader.end()?;
        let state = match tag {
            HELD => State::Held,
            LEAVING => State::Leaving { to: group, mover },
            LEFT => State::Left { to: group, mover },
            ARRIVING => State::Arriving { from: group, mover },
            other => {
                let message =
                    format!("a range is in a state that this build does not know keyspace={name} state={other}");
                return Err(Error::new(ErrorKind::Foreign, message));
            }
        };
        let first = key.slice(name.len().saturating_add(1).min(key.len())..);
        Ok(Self { first, end, state })
    }
}

/// The rows that answer reads, of all groups, by their first key: as far as one replica has applied each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layout(BTreeMap<Bytes, (String, Row)>);

impl Layout {
    /// Of two groups that seem to hold a key, since this replica lags in one of them, the later one given counts; whoever writes there
    /// finds out.
    pub(crate) fn add(&mut self, group: &str, row: Row) {
        if row.serves() {
            self.0.insert(row.first.clone(), (group.to_owned(), row));
        }
    }

    pub(crate) fn covering(&self, key: &[u8]) -> Option<(&str, &Row)> {
        let (_, (group, row)) =
            self.0.range::<[u8], _>((std::ops::Bound::Unbounded, std::ops::Bound::Included(key))).next_back()?;
        row.covers(key).then_some((group.as_str(), row))
    }

    /// The last range with keys before `key`; of all keys without one.
    pub(crate) fn before(&self, key: Option<&[u8]>) -> Option<(&str, &Row)> {
        let upper = key.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let (_, (group, row)) = self.0.range::<[u8], _>((std::ops::Bound::Unbounded, upper)).next_back()?;
        let reaches = match (&row.end, key) {
            (None, _) => true,
            (Some(end), Some(key)) => key <= &end[..],
            (Some(_), None) => false,
        };
        reaches.then_some((group.as_str(), row))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Row)> {
        self.0.values().map(|(group, row)| (group.as_str(), row))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(first: &'static str, end: &'static str, state: State) -> Row {
        let end = (!end.is_empty()).then(|| Bytes::from_static(end.as_bytes()));
        Row { first: Bytes::from_static(first.as_bytes()), end, state }
    }

    #[test]
    fn rows_survive_their_encoding_and_damage_is_typed() {
        let states = [
            State::Held,
            State::Leaving { to: "b".into(), mover: u64::MAX },
            State::Left { to: String::new(), mover: 7 },
            State::Arriving { from: "g".repeat(64), mover: 1 },
        ];
        for state in states {
            for row in [row("", "", state.clone()), row("k", "l", state)] {
                let (key, value) = (row_key("users", &row.first), row.encode());
                assert_eq!(Row::decode("users", &key, &value).expect("ours"), row);
                for cut in 0..value.len() {
                    assert!(Row::decode("users", &key, &value.slice(..cut)).is_err(), "cut at {cut}");
                }
            }
        }
        let mut other = row("a", "b", State::Held).encode().to_vec();
        *other.get_mut(1).expect("the state") = 9;
        let error = Row::decode("users", &row_key("users", b"a"), &other.into()).expect_err("unknown");
        assert_eq!(error.kind(), ErrorKind::Foreign);
    }

    #[test]
    fn rows_of_a_name_are_apart_from_those_of_another_and_of_births() {
        assert_ne!(row_key("a", b"bc"), row_key("ab", b"c"));
        assert_ne!(row_key("a", b""), birth_key("a"));
        let (lower, upper) = births();
        for (key, is_birth) in [(birth_key("\u{10ffff}"), true), (row_key("a", b""), false), (shape_key("a"), false)] {
            assert_eq!(lower < key && key < upper, is_birth, "{key:?}");
        }
        assert_eq!(name_of_birth(&birth_key("a.b")).expect("ours"), "a.b");
        for foreign in [row_key("a", b""), Bytes::from_static(&[BIRTH, 0xff]), Bytes::new()] {
            assert_eq!(name_of_birth(&foreign).map_err(|e| e.kind()), Err(ErrorKind::Corrupt));
        }
        assert!(super::super::PLACED_NAME_BYTES_MAX < usize::from(SHAPE), "no row has the key of a shape");
    }

    #[test]
    fn ranges_cover_their_first_key_and_not_their_end() {
        let middle = row("b", "d", State::Held);
        for (key, covers) in [("a", false), ("b", true), ("c", true), ("d", false)] {
            assert_eq!(middle.covers(key.as_bytes()), covers, "{key}");
        }
        for (other, overlaps) in [
            (row("", "b", State::Held), false),
            (row("", "bb", State::Held), true),
            (row("c", "cc", State::Held), true),
            (row("d", "", State::Held), false),
            (row("", "", State::Held), true),
        ] {
            assert_eq!(middle.overlaps(&other), overlaps, "{other:?}");
            assert_eq!(other.overlaps(&middle), overlaps, "{other:?}");
        }
    }

    #[test]
    fn a_layout_finds_who_answers_for_a_key_from_both_sides() {
        let mut layout = Layout::default();
        layout.add("", row("", "c", State::Held));
        layout.add("b", row("c", "f", State::Leaving { to: String::new(), mover: 1 }));
        layout.add("b", row("f", "", State::Arriving { from: String::new(), mover: 1 }));
        let who = |found: Option<(&str, &Row)>| found.map(|(group, row)| (group.to_owned(), row.first.clone()));
        let at = |group: &str, first: &'static str| Some((group.to_owned(), Bytes::from_static(first.as_bytes())));
        for (key, found) in [("a", at("", "")), ("c", at("b", "c")), ("ee", at("b", "c")), ("f", None)] {
            assert_eq!(who(layout.covering(key.as_bytes())), found, "{key}");
        }
        for (key, found) in [("f", at("b", "c")), ("d", at("b", "c")), ("c", at("", "")), ("g", None)] {
            assert_eq!(who(layout.before(Some(key.as_bytes()))), found, "before {key}");
        }
        assert_eq!(layout.before(None), None, "nobody answers for the last keys");
        layout.add("a", row("f", "", State::Held));
        assert_eq!(who(layout.before(None)), at("a", "f"));
    }
}
