//! What recovery does at each position: a pure function over a table of cases.
//!
//! # Place
//! called by `recovery`, which gathers the facts; no I/O here
//! # Crash
//!
//! The walk stands at position `b`, behind a whole batch (or at the start). `at` is what lies at `b`. `lap` is what lies
//! at the start of the next lap, for a batch that did not fit behind `b` is found there; it counts as `Good` only when
//! it says itself that it follows `b`. `proof` means that some later header of this volume, of the same epoch or a newer
//! one, was written when `b` was already durable. `short` means that the last close was clean and ended behind `b`. `doubt`
//! means that a torn tail is not to be believed: the device does not give a block in which the next batch may lie, or it is torn
//! and acknowledged bytes before it are damaged; and the log went on since it was last closed cleanly, or may have.
//!
//! ```text
//! row  at           lap        proof  short  doubt   verdict            story
//! A    Good         any        any    any    any     adopt              the log goes on
//! B    Newer        any        any    any    any     foreign            written by a newer release
//! C    Other        any        any    any    any     foreign            the zone of another volume was put here
//! D    Future       any        any    any    any     superblock is old  an epoch that the superblock has not seen
//! E    Contradicts  any        any    any    any     corrupt before b   written when all before it was durable, yet it follows
//!                                                                       another batch than the one that was read
//! F    gap          Good       any    any    any     adopt the lap      the end of the lap was skipped
//! G    gap          Newer      any    any    any     foreign            as B
//! H    gap          Other      any    any    any     foreign            as C
//! I    gap          Future     any    any    any     superblock is old  as D
//! J    gap          Contradicts any   any    any     corrupt before b   as E
//! K    gap          gap        yes    any    any     corrupt at b       acknowledged bytes are damaged
//! L    gap          gap        no     yes    any     corrupt at b       a clean log cannot be torn
//! M    Torn         gap        no     no     no      cut, torn          the crash tore the batch in flight
//! N    Nothing      Torn       no     no     no      cut, torn          the same, behind a skipped lap end
//! O    Nothing      Nothing    no     no     no      cut, end           nothing was written here since the last lap
//! P    gap          gap        no     no     yes     corrupt at b       what was there may have been acknowledged
//! ```
//!
//! Where the owner of the log can get from elsewhere what is lost ([`crate::WalOptions::holes`]), rows K, L and P go on behind the
//! damage: behind the batch when its header is whole, else at the next header, else (row L) at the clean end or (row P) behind
//! the blocks that cannot be read. What is whole of the batch is delivered.
//!
//! `gap` is `Nothing` or `Torn`. A later batch that is whole but claims no more than `b` was in flight together with the
//! torn one; it was never acknowledged (prefix rule) and is cut with it.
//!
//! One case looks like a torn tail and is not: other bytes in the very last batch of a log that was not closed cleanly, when
//! nothing at all was written behind it. No byte on this volume tells the two apart; a replica does.

use crate::Lsn;

/// What lies at a position where a batch may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Nothing that was meant for here: no header, or one of an earlier lap or epoch.
    Nothing,
    /// The header of the next batch, but not its whole body.
    Torn,
    /// The next batch.
    Good,
    /// A header that belongs here and was written when all before it was durable, but follows another batch.
    Contradicts,
    /// A header of this volume with an epoch that nobody was given yet.
    Future,
    /// A header of a newer format.
    Newer,
    /// A header of another volume.
    Other,
}

#[cfg(test)]
pub(crate) const FOUND_ALL: [Found; 7] =
    [Found::Nothing, Found::Torn, Found::Good, Found::Contradicts, Found::Future, Found::Newer, Found::Other];

/// The facts at one position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) at: Found,
    /// `Nothing` when `b` itself begins a lap.
    pub(crate) lap: Found,
    pub(crate) proof: bool,
    pub(crate) short: bool,
    pub(crate) doubt: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Adopt,
    AdoptLap,
    CutEnd,
    CutTorn,
    Corrupt,
    CorruptBefore,
    SuperblockOld,
    NewerFormat,
    OtherVolume,
}

/// A row of the table. An empty list of findings and a missing answer stand for any.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) letter: char,
    at: &'static [Found],
    lap: &'static [Found],
    proof: Option<bool>,
    short: Option<bool>,
    doubt: Option<bool>,
    pub(crate) verdict: Verdict,
}

const ANY: &[Found] = &[];
const GAP: &[Found] = &[Found::Nothing, Found::Torn];

const fn row(
    letter: char,
    at: &'static [Found],
    lap: &'static [Found],
    proof: Option<bool>,
    short: Option<bool>,
    doubt: Option<bool>,
    verdict: Verdict,
) -> Row {
    Row { letter, at, lap, proof, short, doubt, verdict }
}

pub(crate) const TABLE: [Row; 16] = [
    row('A', &[Found::Good], ANY, None, None, None, Verdict::Adopt),
    row('B', &[Found::Newer], ANY, None, None, None, Verdict::NewerFormat),
    row('C', &[Found::Other], ANY, None, None, None, Verdict::OtherVolume),
    row('D', &[Found::Future], ANY, None, None, None, Verdict::SuperblockOld),
    row('E', &[Found::Contradicts], ANY, None, None, None, Verdict::CorruptBefore),
    row('F', GAP, &[Found::Good], None, None, None, Verdict::AdoptLap),
    row('G', GAP, &[Found::Newer], None, None, None, Verdict::NewerFormat),
    row('H', GAP, &[Found::Other], None, None, None, Verdict::OtherVolume),
    row('I', GAP, &[Found::Future], None, None, None, Verdict::SuperblockOld),
    row('J', GAP, &[Found::Contradicts], None, None, None, Verdict::CorruptBefore),
    row('K', GAP, GAP, Some(true), None, None, Verdict::Corrupt),
    row('L', GAP, GAP, Some(false), Some(true), None, Verdict::Corrupt),
    row('M', &[Found::Torn], GAP, Some(false), Some(false), Some(false), Verdict::CutTorn),
    row('N', &[Found::Nothing], &[Found::Torn], Some(false), Some(false), Some(false), Verdict::CutTorn),
    row('O', &[Found::Nothing], &[Found::Nothing], Some(false), Some(false), Some(false), Verdict::CutEnd),
    row('P', GAP, GAP, Some(false), Some(false), Some(true), Verdict::Corrupt),
];

impl Row {
    pub(crate) fn matches(&self, facts: &Facts) -> bool {
        let among = |list: &[Found], found| list.is_empty() || list.contains(&found);
        let is = |want: Option<bool>, have| want.is_none_or(|want| want == have);
        among(self.at, facts.at)
            && among(self.lap, facts.lap)
            && is(self.proof, facts.proof)
            && is(self.short, facts.short)
            && is(self.doubt, facts.doubt)
    }
}

/// The one row that matches.
pub(crate) fn decide(facts: &Facts) -> &'static Row {
    TABLE.iter().find(|row| row.matches(facts)).expect("a test proves that exactly one row matches every input")
}

/// Whether the verdict depends on what lies further behind, which costs a scan.
pub(crate) fn needs_scan(at: Found, lap: Found) -> bool {
    decide(&Facts { at, lap, proof: true, short: false, doubt: false }).proof.is_some()
}

/// What the next batch must match.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tail {
    /// Where the last batch ended.
    pub(crate) end: Lsn,
    /// Its checksum; unknown at the start.
    pub(crate) chain: Option<u64>,
    /// Its epoch; 0 at the start.
    pub(crate) epoch: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_row_matches_each_input() {
        for at in FOUND_ALL {
            for lap in FOUND_ALL {
                for bits in 0..8 {
                    let [proof, short, doubt] = [1, 2, 4].map(|bit| bits & bit != 0);
                    let facts = Facts { at, lap, proof, short, doubt };
                    let rows: Vec<char> = TABLE.iter().filter(|r| r.matches(&facts)).map(|r| r.letter).collect();
                    assert!(rows.len() == 1, "{facts:?} is matched by {rows:?}");
                }
            }
        }
    }

    #[test]
    fn the_table_in_the_text_is_the_table_in_the_code() {
        let text: Vec<char> = include_str!("cases.rs")
            .lines()
            .filter_map(|l| l.strip_prefix("//! "))
            .filter(|l| l.as_bytes().get(1..5) == Some(b"    ") && l.starts_with(|c: char| c.is_ascii_uppercase()))
            .filter_map(|l| l.chars().next())
            .collect();
        let code: Vec<char> = TABLE.iter().map(|r| r.letter).collect();
        assert_eq!(text, code);
    }

    #[test]
    fn only_gaps_without_a_lap_batch_need_a_scan() {
        for at in FOUND_ALL {
            for lap in FOUND_ALL {
                let gap = GAP.contains(&at) && GAP.contains(&lap);
                assert_eq!(needs_scan(at, lap), gap, "{at:?} {lap:?}");
            }
        }
    }
}
