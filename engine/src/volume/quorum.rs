//! Which of the copies of the superblock is the superblock: a pure function over a table of cases.
//!
//! # Crash
//!
//! An update writes copies 0 and 1, waits until both are durable, then 2 and 3. So at every moment at least two copies of
//! the old or of the new content are whole, and a crash leaves content `s` and `s + 1` at most. Opening writes what was
//! chosen to every copy that differs, before anything else. `newest` is the content with the highest sequence among the
//! whole copies, `older` the content with the next one; `linked` says that `newest` names `older` as its parent.
//!
//! ```text
//! row  newest     older           more   verdict            story
//! A    any        any             any    newer format       some copy is whole and of a newer format
//! B    none       none            magic  corrupt            every copy is damaged
//! C    none       none            none   not a volume       zeroes, or bytes of someone else
//! D    two        another one     any    take newest        the usual state, also with up to two damaged copies
//! E    two        same sequence   any    corrupt            two contents with one sequence: no crash does that
//! F    one        linked, two     any    take older         the crash came before the second copy
//! G    one        linked, one     any    take newest        the same, and one copy is damaged; the link proves that
//!                                                           nothing lies between the two
//! H    one first  none, rest blank       not a volume       a format was cut short: nothing was ever stored
//! I    one        anything else   any    corrupt            a single copy may be older than what was acknowledged
//! ```
//!
//! A copy that the device does not give is one that is not whole. Where the verdict would be corrupt it is `Io` then: the device may give
//! the copy another time, and nobody shall throw the volume away for it.

use super::superblock::{COPIES, Copy, Superblock};

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Take(Box<Superblock>),
    NotAVolume,
    FormatCutShort,
    NewerFormat(u16),
    Corrupt(&'static str),
}

/// How the contents of the whole copies relate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    newer: Option<u16>,
    /// Copies of the newest content; 0 when no copy is whole.
    newest: usize,
    /// The newest is the first superblock of a volume, and every other copy is blank.
    first_alone: bool,
    older: Older,
    /// Some copy that is not whole has our magic.
    damaged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Older {
    None,
    /// The same sequence as the newest with other content.
    Rival,
    /// The parent of the newest, in so many copies, and nothing below it.
    Linked(usize),
    Unlinked,
}

/// The letter of the row that matches `facts`. Written as one `match` without a catch-all for the states that the table
/// tells apart, so the compiler proves that every input has exactly one row.
pub(crate) fn row(facts: &Facts) -> char {
    match (facts.newer, facts.newest, facts.older) {
        (Some(_), _, _) => 'A',
        (None, 0, _) if facts.damaged => 'B',
        (None, 0, _) => 'C',
        (None, _, Older::Rival) => 'E',
        (None, 1, Older::Linked(copies)) if copies >= 2 => 'F',
        (None, 1, Older::Linked(_)) => 'G',
        (None, 1, Older::None) if facts.first_alone => 'H',
        (None, 1, Older::None | Older::Unlinked) => 'I',
        (None, _, Older::None | Older::Linked(_) | Older::Unlinked) => 'D',
    }
}

/// Copies that an update has left behind which a crash cut short: whole, of the content just before or just after `chosen`, and all in the
/// pair that was being written. A copy that tore is not among them: rot looks the same.
pub(crate) fn cut_short(copies: &[Copy; COPIES], chosen: &Superblock) -> usize {
    let checksum = chosen.checksum();
    let next =
        |copy: &&Copy| matches!(copy, Copy::Whole(found, sum) if *sum == chosen.parent || found.parent == checksum);
    let (first, second) = copies.split_at(COPIES / 2);
    match (first.iter().filter(next).count(), second.iter().filter(next).count()) {
        (count, 0) | (0, count) => count,
        _ => 0,
    }
}

/// Chooses among the copies.
pub(crate) fn choose(copies: &[Copy; COPIES]) -> (char, Verdict) {
    let mut contents: Vec<(&Superblock, u64, usize)> = Vec::new();
    for copy in copies {
        let Copy::Whole(superblock, checksum) = copy else { continue };
        match contents.iter_mut().find(|(_, sum, _)| sum == checksum) {
            Some((_, _, count)) => *count += 1,
            None => contents.push((superblock, *checksum, 1)),
        }
    }
    contents.sort_by_key(|(superblock, ..)| std::cmp::Reverse(superblock.sequence));
    let newest = contents.first().copied();
    let older = contents.get(1).copied();
    let facts = Facts {
        newer: copies.iter().find_map(|c| if let Copy::Newer(version) = c { Some(*version) } else { None }),
        newest: newest.map_or(0, |(.., count)| count),
        first_alone: newest.is_some_and(|(superblock, ..)| superblock.parent == 0)
            && copies.iter().filter(|c| **c == Copy::Blank).count() == COPIES - 1,
        older: match (newest, older) {
            (Some((newest, ..)), Some((older, ..))) if newest.sequence == older.sequence => Older::Rival,
            (Some((newest, ..)), Some((_, checksum, count))) if newest.parent == checksum && contents.len() == 2 => {
                Older::Linked(count)
            }
            (_, Some(_)) => Older::Unlinked,
            (_, None) => Older::None,
        },
        damaged: copies.contains(&Copy::Damaged) || copies.contains(&Copy::Unreadable),
    };
    let take = |content: Option<(&Superblock, u64, usize)>| {
        let (superblock, ..) = content.expect("the row says that there is such a content");
        Verdict::Take(Box::new(superblock.clone()))
    };
    let letter = row(&facts);
    let verdict = match letter {
        'A' => Verdict::NewerFormat(facts.newer.unwrap_or_default()),
        'B' => Verdict::Corrupt("every copy of the superblock is damaged"),
        'C' => Verdict::NotAVolume,
        'D' | 'G' => take(newest),
        'E' => Verdict::Corrupt("two superblocks have the same sequence"),
        'F' => take(older),
        'H' => Verdict::FormatCutShort,
        _ => Verdict::Corrupt("only one copy of the superblock is whole, and nothing shows that it is the last one"),
    };
    (letter, verdict)
}
