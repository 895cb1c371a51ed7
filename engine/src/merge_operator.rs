//! Merge operators: what becomes of a value when an operand is merged into it, decided by the embedder.
//!
//! # Place
//! registered in [`crate::GroupSettings`], given to keyspaces by [`crate::CommandBody::SetOperator`]; called by the applier, by readers
//! and by compactions
//! # Invariants
//! 1. The value of a key is what its operands make of the value below them, one after the other, the oldest first. Where operands are
//!    combined before that value is known ([`OperandCombiner`]) the outcome is the same, so it does not depend on what was flushed or
//!    compacted.
//! 2. A merge that is refused stays so: the key has failed until it is put, removed, or in a range that is removed. What
//!    is merged into it meanwhile changes nothing. So it does not matter who finds out, and when.
//! 3. Only operands of an operator that combines them reach a memtable: one for each key and memtable or table at most, which bounds
//!    what there is of them, and in a memtable one version for each entry, however many it merges. Those of others are merged as their entry
//!    is applied.
//! # Why not
//! Lists of operands in tables, folded when their value is met: a key that nobody reads would grow without a bound, and a
//! compaction that cannot hold its list has no outcome.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::command::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use crate::read::Lookup;
use crate::{Error, ErrorKind, KeyspaceId, Result, WriteOp};

/// Names of the operators of this crate begin with it; no other does.
const OWN_PREFIX: &str = "mainstay.";
/// Bytes of a key that a message shows.
const KEY_SHOWN_BYTES: usize = 64;

/// Which operator: a name and a version, for ever the same function.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperatorId {
    name: Cow<'static, str>,
    version: u32,
}

impl OperatorId {
    /// Adds numbers: value and operand are `u64`, 8 bytes little-endian. An absent value counts as 0; a sum that is too large
    /// is [`u64::MAX`], and stays there.
    pub const U64_ADD: Self = Self { name: Cow::Borrowed("mainstay.u64_add"), version: 1 };
    /// Appends the operand to the value; an absent value counts as empty. For values of some KiB: memory holds all that was appended to a
    /// key since its last flush anew for each commit, and whoever reads the key copies all of it.
    pub const APPEND: Self = Self { name: Cow::Borrowed("mainstay.append"), version: 1 };

    /// An operator of the embedder: a name of 1 to 255 bytes, which does not begin with `mainstay.`, and a version. Another
    /// function is another version: data that was written under the one is never read under the other.
    pub fn new(name: impl Into<Cow<'static, str>>, version: u32) -> Self {
        Self { name: name.into(), version }
    }

    /// As [`OperatorId::new`], for a constant.
    pub const fn new_static(name: &'static str, version: u32) -> Self {
        Self { name: Cow::Borrowed(name), version }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The version.
    pub fn version(&self) -> u32 {
        self.version
    }
}

impl fmt::Display for OperatorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} version {}", self.name, self.version)
    }
}

/// Why an operator does not merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MergeRefused(String);

impl MergeRefused {
    /// With what is wrong, in few words.
    pub fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

impl fmt::Display for MergeRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Merges operands into values. Runs on every replica, at different times, also while others do: the same arguments give the
/// same outcome always, and nothing but the arguments goes into it: no clock, no chance, no state. It does not panic: what it cannot merge
/// it refuses.
pub trait MergeOperator: Send + Sync + 'static {
    /// Its name and version.
    fn id(&self) -> OperatorId;

    /// Refuses operands that it merges into nothing: asked before one is written, so that the batch is refused.
    ///
    /// # Errors
    /// Why.
    fn check(&self, operand: &[u8]) -> Result<(), MergeRefused> {
        let _ = operand;
        Ok(())
    }

    /// Makes of a value what it is behind the operand. `None` is an absent key, before as after. A value over
    /// [`VALUE_BYTES_MAX`] counts as refused.
    ///
    /// # Errors
    /// Why it cannot; what `value` is then does not matter.
    fn merge(&self, key: &[u8], value: &mut Option<Vec<u8>>, operand: &[u8]) -> Result<(), MergeRefused>;

    /// Combines operands whose value is not known yet. With one a merge is written blindly, without one the value is read when
    /// its entry is applied.
    fn combiner(&self) -> Option<&dyn OperandCombiner> {
        None
    }
}

/// Makes one operand of two.
///
/// For every value, merging what was combined gives what merging the one and then the other gives; and is refused when one of
/// those would be. Likewise [`OperandCombiner::combine`] is refused, or gives more than [`VALUE_BYTES_MAX`], only where one of those would be
/// refused whatever the value.
pub trait OperandCombiner {
    /// Makes of the older operand what both are together.
    ///
    /// # Errors
    /// Why it cannot.
    fn combine(&self, key: &[u8], older: &mut Vec<u8>, newer: &[u8]) -> Result<(), MergeRefused>;
}

/// See [`OperatorId::U64_ADD`]. Without overflow it is the sum in any order, and at the bound it stays, so it can be grouped as one likes.
struct U64Add;

fn number(bytes: &[u8]) -> Result<u64, MergeRefused> {
    let bytes = <[u8; 8]>::try_from(bytes);
    bytes.map(u64::from_le_bytes).map_err(|_| MergeRefused::new("not a number of 8 bytes"))
}

impl MergeOperator for U64Add {
    fn id(&self) -> OperatorId {
        OperatorId::U64_ADD
    }

    fn check(&self, operand: &[u8]) -> Result<(), MergeRefused> {
        number(operand).map(drop)
    }

    fn merge(&self, _: &[u8], value: &mut Option<Vec<u8>>, operand: &[u8]) -> Result<(), MergeRefused> {
        let before = value.as_deref().map_or(Ok(0), number)?;
        *value = Some(before.saturating_add(number(operand)?).to_le_bytes().to_vec());
        Ok(())
    }

    fn combiner(&self) -> Option<&dyn OperandCombiner> {
        Some(self)
    }
}

impl OperandCombiner for U64Add {
    fn combine(&self, _: &[u8], older: &mut Vec<u8>, newer: &[u8]) -> Result<(), MergeRefused> {
        *older = number(older)?.saturating_add(number(newer)?).to_le_bytes().to_vec();
        Ok(())
    }
}

/// See [`OperatorId::APPEND`].
struct Append;

impl MergeOperator for Append {
    fn id(&self) -> OperatorId {
        OperatorId::APPEND
    }

    fn merge(&self, _: &[u8], value: &mut Option<Vec<u8>>, operand: &[u8]) -> Result<(), MergeRefused> {
        value.get_or_insert_default().extend_from_slice(operand);
        Ok(())
    }

    fn combiner(&self) -> Option<&dyn OperandCombiner> {
        Some(self)
    }
}

impl OperandCombiner for Append {
    fn combine(&self, _: &[u8], older: &mut Vec<u8>, newer: &[u8]) -> Result<(), MergeRefused> {
        older.extend_from_slice(newer);
        Ok(())
    }
}

/// The operators that a group can run: those of this crate, and those of the embedder. Cloning shares them.
#[derive(Clone)]
pub struct MergeOperators(Arc<BTreeMap<OperatorId, Operator>>);

impl Default for MergeOperators {
    fn default() -> Self {
        let own: [Arc<dyn MergeOperator>; 2] = [Arc::new(U64Add), Arc::new(Append)];
        Self(Arc::new(own.into_iter().map(|operator| (operator.id(), Operator(operator))).collect()))
    }
}

impl MergeOperators {
    /// Adds one of the embedder. Of two with one name and version the later counts.
    ///
    /// # Errors
    /// `Invalid` for a name of 0 or more than 255 bytes, or one that begins with `mainstay.`.
    pub fn add(&mut self, operator: Arc<dyn MergeOperator>) -> Result<()> {
        let id = operator.id();
        crate::codec::check_name(id.name())?;
        if id.name().starts_with(OWN_PREFIX) {
            let message =
                format!("names of merge operators that begin with {OWN_PREFIX} are reserved name={}", id.name);
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Arc::make_mut(&mut self.0).insert(id, Operator(operator));
        Ok(())
    }

    pub(crate) fn get(&self, id: &OperatorId) -> Option<&Operator> {
        self.0.get(id)
    }

    /// The operator that a keyspace needs.
    ///
    /// # Errors
    /// `Invalid`, and what to do.
    pub(crate) fn require(&self, id: &OperatorId, keyspace: &str) -> Result<&Operator> {
        self.get(id).ok_or_else(|| {
            let others = self.0.keys().filter(|other| other.name == id.name).map(|other| other.version.to_string());
            let others: Vec<String> = others.collect();
            let has = if others.is_empty() { "none".to_owned() } else { others.join(", ") };
            let message = format!(
                "a keyspace needs a merge operator that is not registered: open the store with it beside the others \
                 keyspace={keyspace} operator={} version={} versions_registered={has}",
                id.name, id.version
            );
            Error::new(ErrorKind::Invalid, message)
        })
    }
}

impl fmt::Debug for MergeOperators {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// An operator that is equal to those of the same name and version.
#[derive(Clone)]
pub(crate) struct Operator(Arc<dyn MergeOperator>);

impl PartialEq for Operator {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.id() == other.0.id()
    }
}

impl fmt::Debug for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.id().fmt(f)
    }
}

impl Operator {
    pub(crate) fn id(&self) -> OperatorId {
        self.0.id()
    }

    /// Operands are written blindly.
    pub(crate) fn combines(&self) -> bool {
        self.0.combiner().is_some()
    }

    /// Refuses operands that must not be written.
    ///
    /// # Errors
    /// `Invalid`.
    pub(crate) fn check(&self, operand: &[u8]) -> Result<()> {
        self.0.check(operand).map_err(|why| {
            let id = self.0.id();
            let message =
                format!("a merge operator refuses an operand: {why} operator={} version={}", id.name, id.version);
            Error::new(ErrorKind::Invalid, message)
        })
    }

    /// What operands, the newest first, make of a value that is known.
    ///
    /// # Errors
    /// `Invalid`: the operator refuses, or the value would be too long.
    pub(crate) fn apply(&self, key: &[u8], value: Option<&[u8]>, operands: &[Bytes]) -> Result<Option<Bytes>> {
        let mut merged = value.map(<[u8]>::to_vec);
        match self.merge(key, &mut merged, operands) {
            Ok(()) => Ok(merged.map(Bytes::from)),
            Err(why) => {
                let id = self.0.id();
                let message = format!(
                    "a merge operator refuses to merge: {why}: nothing was applied operator={} version={} key={}",
                    id.name,
                    id.version,
                    shown(key)
                );
                Err(Error::new(ErrorKind::Invalid, message))
            }
        }
    }

    /// What operands make of what lies below them, the newest first; with `None` that is not known.
    ///
    /// # Errors
    /// `Invalid`: operands are to be combined, and the operator does not do that any more.
    pub(crate) fn resolve(&self, key: &[u8], below: Option<Lookup>, operands: &[Bytes]) -> Result<Lookup> {
        let mut value = match below {
            Some(Lookup::Failed) => return Ok(Lookup::Failed),
            Some(Lookup::Value(value)) => Some(value.to_vec()),
            Some(Lookup::Deleted) => None,
            Some(Lookup::Operand(operand)) => return self.combine(key, operand, operands),
            None => match operands.split_last() {
                Some((oldest, newer)) => return self.combine(key, oldest.clone(), newer),
                None => return Ok(Lookup::Deleted),
            },
        };
        if self.merge(key, &mut value, operands).is_err() {
            return Ok(Lookup::Failed);
        }
        Ok(value.map_or(Lookup::Deleted, |value| Lookup::Value(exact(value))))
    }

    fn merge(&self, key: &[u8], value: &mut Option<Vec<u8>>, operands: &[Bytes]) -> Result<(), MergeRefused> {
        operands.iter().rev().try_for_each(|operand| {
            self.0.merge(key, value, operand)?;
            fits(value.as_deref())
        })
    }

    fn combine(&self, key: &[u8], oldest: Bytes, newer: &[Bytes]) -> Result<Lookup> {
        if newer.is_empty() {
            return Ok(Lookup::Operand(oldest));
        }
        let Some(combiner) = self.0.combiner() else {
            let id = self.0.id();
            let message = format!(
                "a merge operator combined operands when they were written and does not any more: give it another version \
                 operator={} version={}",
                id.name, id.version
            );
            return Err(Error::new(ErrorKind::Invalid, message));
        };
        let mut all = oldest.to_vec();
        for operand in newer.iter().rev() {
            if combiner.combine(key, &mut all, operand).and_then(|()| fits(Some(&all))).is_err() {
                return Ok(Lookup::Failed);
            }
        }
        Ok(Lookup::Operand(exact(all)))
    }
}

/// Without the room that a growing vector has to spare: a memtable keeps it, and counts its length.
fn exact(value: Vec<u8>) -> Bytes {
    value.into_boxed_slice().into()
}

fn fits(value: Option<&[u8]>) -> Result<(), MergeRefused> {
    match value.map_or(0, <[u8]>::len) {
        0..=VALUE_BYTES_MAX => Ok(()),
        length => Err(MergeRefused::new(format!("the value is too long length={length} length_max={VALUE_BYTES_MAX}"))),
    }
}

/// The mutations of one entry on one branch in their order, with the operands of each key together, the newest first, at the last of them; what a later
/// put or removal of its key takes is left out. So what an entry merges into a key is held once, and not once for each operand.
/// Ranges have taken what is theirs before. Nothing when there is no merge.
pub(crate) fn join_operands(ops: &[WriteOp]) -> Vec<(&WriteOp, Vec<Bytes>)> {
    let mut joined = Vec::new();
    if !ops.iter().any(|op| matches!(op, WriteOp::Merge { .. })) {
        return joined;
    }
    // Of the keys that were met where their operands are; nothing once all is known of one.
    let mut met: BTreeMap<(KeyspaceId, &[u8]), Option<usize>> = BTreeMap::new();
    for op in ops.iter().rev() {
        let place = (op.keyspace(), &op.key()[..]);
        match op {
            WriteOp::DeleteRange { .. } => joined.push((op, Vec::new())),
            WriteOp::Put { .. } | WriteOp::PutFor { .. } | WriteOp::Delete { .. } => {
                if met.insert(place, None) != Some(None) {
                    joined.push((op, Vec::new()));
                }
            }
            WriteOp::Merge { operand, .. } => match met.entry(place) {
                Entry::Vacant(new) => {
                    new.insert(Some(joined.len()));
                    joined.push((op, vec![operand.clone()]));
                }
                Entry::Occupied(known) => {
                    if let Some((_, operands)) = known.get().and_then(|at| joined.get_mut(at)) {
                        operands.push(operand.clone());
                    }
                }
            },
        }
    }
    joined.reverse();
    joined
}

/// The answer to who reads a key of which a merge was refused (invariant 2).
pub(crate) fn failed(key: &[u8]) -> Error {
    debug_assert!(key.len() <= KEY_BYTES_MAX, "no key is longer");
    let message = format!(
        "the key has no value since its merge operator refused an operand, or the value would be too long: put or remove it \
         key={}",
        shown(key)
    );
    Error::new(ErrorKind::Invalid, message)
}

/// The keyspace has none.
pub(crate) fn no_operator(keyspace: KeyspaceId) -> Error {
    let message = format!("the keyspace has no merge operator: give it one before merging keyspace={keyspace}");
    Error::new(ErrorKind::Invalid, message)
}

/// An operand was found where none can be.
pub(crate) fn stray_operand() -> Error {
    Error::new(ErrorKind::Corrupt, "the table has a merge operand, and its keyspace has no merge operator")
}

fn shown(key: &[u8]) -> impl fmt::Display {
    key.get(..KEY_SHOWN_BYTES).unwrap_or(key).escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn operator(id: OperatorId) -> Operator {
        MergeOperators::default().get(&id).expect("one of this crate").clone()
    }

    fn list(operands: &[&[u8]]) -> Vec<Bytes> {
        operands.iter().rev().map(|operand| Bytes::copy_from_slice(operand)).collect()
    }

    #[test]
    fn operands_are_merged_from_the_oldest_on() {
        let append = operator(OperatorId::APPEND);
        let resolve = |below, operands: &[&[u8]]| append.resolve(b"k", below, &list(operands)).expect("it combines");
        assert_eq!(resolve(Some(Lookup::Value("0".into())), &[b"1", b"2"]), Lookup::Value("012".into()));
        assert_eq!(resolve(Some(Lookup::Deleted), &[b"1", b"2"]), Lookup::Value("12".into()));
        assert_eq!(resolve(Some(Lookup::Operand("0".into())), &[b"1", b"2"]), Lookup::Operand("012".into()));
        assert_eq!(resolve(None, &[b"1", b"2"]), Lookup::Operand("12".into()));
        assert_eq!(resolve(Some(Lookup::Failed), &[b"1"]), Lookup::Failed);
    }

    #[test]
    fn what_would_be_too_long_is_refused() {
        let append = operator(OperatorId::APPEND);
        let most = Bytes::from(vec![7; VALUE_BYTES_MAX]);
        let one = list(&[b"1"]);
        let below = Lookup::Value(most.clone());
        assert_eq!(append.resolve(b"k", Some(below), &one).expect("it merges"), Lookup::Failed);
        assert_eq!(
            append.resolve(b"k", None, &[&one[..], std::slice::from_ref(&most)].concat()).expect("it combines"),
            Lookup::Failed
        );
        let error = append.apply(b"k", Some(&most), &one).expect_err("too long");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("the value is too long length=16777217 length_max=16777216"), "{error}");
    }

    #[test]
    fn operands_of_a_key_are_joined_behind_what_they_merge_into() {
        let op = |word: &str| {
            let (kind, rest) = word.split_at(1);
            let (key, value) = rest.split_at(1);
            let (key, value) = (Bytes::from(key.to_owned()), Bytes::from(value.to_owned()));
            let keyspace = KeyspaceId(0);
            match kind {
                "+" => WriteOp::Merge { keyspace, key, operand: value },
                "=" => WriteOp::Put { keyspace, key, value },
                _ => WriteOp::Delete { keyspace, key },
            }
        };
        let check = |ops: &str, expected: &[&str]| {
            let ops: Vec<WriteOp> = ops.split(' ').map(op).collect();
            let shown = |(op, operands): &(&WriteOp, Vec<Bytes>)| {
                let key = String::from_utf8_lossy(op.key());
                let operands: Vec<_> = operands.iter().map(|bytes| String::from_utf8_lossy(bytes)).collect();
                match op {
                    WriteOp::Merge { .. } => format!("+{key}{}", operands.join(",")),
                    WriteOp::Put { value, .. } => format!("={key}{}", String::from_utf8_lossy(value)),
                    _ => format!("-{key}"),
                }
            };
            assert_eq!(join_operands(&ops).iter().map(shown).collect::<Vec<_>>(), expected);
        };
        check("=a1 -b", &[]);
        check("+a1", &["+a1"]);
        check("+a1 +b2 +a3 +a4", &["+b2", "+a4,3,1"]);
        check("+a1 =a2 +a3 +a4", &["=a2", "+a4,3"]);
        check("+a1 -a +a2 =a3", &["=a3"]);
        check("=a1 -a +b1 +a2", &["-a", "+b1", "+a2"]);
        check("=a1 =a2 +b1", &["=a2", "+b1"]);
    }

    proptest! {
        /// What makes it indifferent what was combined before its value was known.
        #[test]
        fn sums_do_not_depend_on_how_they_are_grouped(
            value in prop::option::of(any::<u64>()),
            numbers in prop::collection::vec(prop_oneof![any::<u64>(), 0..9u64], 1..9),
            cut in any::<prop::sample::Index>(),
        ) {
            let add = operator(OperatorId::U64_ADD);
            let below = value.map_or(Lookup::Deleted, |value| Lookup::Value(Bytes::copy_from_slice(&value.to_le_bytes())));
            let operands: Vec<Bytes> = numbers.iter().rev().map(|n| Bytes::copy_from_slice(&n.to_le_bytes())).collect();
            let at_once = add.resolve(b"k", Some(below.clone()), &operands).expect("it combines");
            let (newer, older) = operands.split_at(cut.index(operands.len()));
            let older = match older {
                [] => Vec::new(),
                older => match add.resolve(b"k", None, older).expect("it combines") {
                    Lookup::Operand(operand) => vec![operand],
                    other => panic!("{other:?}"),
                },
            };
            let grouped = [newer.to_vec(), older].concat();
            prop_assert_eq!(&add.resolve(b"k", Some(below), &grouped).expect("it combines"), &at_once);
            let sum = numbers.iter().fold(value.unwrap_or(0), |sum, n| sum.saturating_add(*n));
            prop_assert_eq!(at_once, Lookup::Value(Bytes::copy_from_slice(&sum.to_le_bytes())));
        }
    }
}
