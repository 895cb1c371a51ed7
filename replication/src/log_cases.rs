//! What a member does whose log has lost entries: a pure function over a table of cases.
//!
//! # Place
//! called by `log_heal`, which asks the other voters; no I/O here
//! # Crash
//!
//! `best` is the most helpful answer of the other voters for the first entry that is missing. `all` says that every other voter
//! has answered for itself, and that there is one at all.
//!
//! ```text
//! row  best     all   verdict  story
//! A    proven   any   fill     a log has the entry behind the missing ones, or has them committed: they are the same
//! B    purged   any   import   they are in tables there: the state is taken over
//! C    damaged  yes   halt     nobody has them, and one who lost them too may have had them: never an invention
//! D    nothing  yes   follow   no other voter has them, so no majority ever had: they were not committed. The log goes on as
//!                              the most complete one of the others does, which holds every committed entry
//! E    damaged  no    wait     who has not answered may have them
//! F    nothing  no    wait     the same
//! ```
//!
//! Until the verdict is carried out the member votes for nobody, acknowledges nothing and truncates nothing: it does not take
//! part. Row D: an entry is committed once a majority has it durable. This member may be one of them, so another voter is
//! too; each later leader had it, and so the most complete of all other logs (by last term, then index) has it.

/// What the other voters said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Best {
    Nothing,
    Damaged,
    Purged,
    Proven,
}

/// What is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) best: Best,
    pub(crate) all: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Take the entries that were proven.
    Fill,
    /// Take over the state of another replica.
    Import,
    /// Say which entries are lost, and go on asking: an operator may bring a copy back.
    Halt,
    /// Make the log end as the most complete one of the others does.
    Follow,
    /// Ask again.
    Wait,
}

/// A row of the table; a missing answer stands for any.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) letter: char,
    best: Best,
    all: Option<bool>,
    pub(crate) verdict: Verdict,
}

const fn row(letter: char, best: Best, all: Option<bool>, verdict: Verdict) -> Row {
    Row { letter, best, all, verdict }
}

pub(crate) const TABLE: [Row; 6] = [
    row('A', Best::Proven, None, Verdict::Fill),
    row('B', Best::Purged, None, Verdict::Import),
    row('C', Best::Damaged, Some(true), Verdict::Halt),
    row('D', Best::Nothing, Some(true), Verdict::Follow),
    row('E', Best::Damaged, Some(false), Verdict::Wait),
    row('F', Best::Nothing, Some(false), Verdict::Wait),
];

impl Row {
    fn matches(&self, facts: &Facts) -> bool {
        self.best == facts.best && self.all.is_none_or(|all| all == facts.all)
    }
}

/// The one row that matches.
pub(crate) fn decide(facts: &Facts) -> &'static Row {
    TABLE.iter().find(|row| row.matches(facts)).expect("a test proves that exactly one row matches every input")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_one_row_matches_each_input() {
        for best in [Best::Nothing, Best::Damaged, Best::Purged, Best::Proven] {
            for all in [false, true] {
                let facts = Facts { best, all };
                let rows: Vec<char> = TABLE.iter().filter(|r| r.matches(&facts)).map(|r| r.letter).collect();
                assert!(rows.len() == 1, "{facts:?} is matched by {rows:?}");
            }
        }
    }

    #[test]
    fn the_table_in_the_text_is_the_table_in_the_code() {
        let text: Vec<char> = include_str!("log_cases.rs")
            .lines()
            .filter_map(|l| l.strip_prefix("//! "))
            .filter(|l| l.as_bytes().get(1..5) == Some(b"    ") && l.starts_with(|c: char| c.is_ascii_uppercase()))
            .filter_map(|l| l.chars().next())
            .collect();
        let code: Vec<char> = TABLE.iter().map(|r| r.letter).collect();
        assert_eq!(text, code);
    }

    /// What is lost is never made up and never given up while somebody may have it.
    #[test]
    fn entries_are_dropped_only_when_every_other_voter_never_had_them() {
        for row in &TABLE {
            let drops = row.verdict == Verdict::Follow;
            assert_eq!(drops, row.best == Best::Nothing && row.all == Some(true), "row {}", row.letter);
        }
    }
}
