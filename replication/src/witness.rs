//! A voter that keeps the log and no tables.
//!
//! # Place
//! below `state_machine`, which applies to a [`Replica`]; `node` decides which kind it is
//! # Invariants
//! - W1. A witness votes and acknowledges as any voter: what it acknowledged is durable in its log.
//! - W2. It answers no read and proposes no write. When it has to lead, since nobody else has a log that goes as far, it sends the
//!   others what they lack and hands leadership to one of them.
//! - W3. What it has applied is what its log may forget: it keeps as much of the log as its ring takes, for those that lag.
//! - W4. Witnesses are fewer than half of the voters, so a majority has one that holds the data.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use mainstay_engine::{Applied, Command, Group, LogIndex, TableSource};

use crate::log_store::LogStore;
use crate::node::{Inner, Running};
use crate::state_machine::{Exported, State};
use crate::{Error, ErrorKind, MemberInfo, Result, Runtime};

/// Pause between two attempts of a witness to hand leadership over.
const HAND_OVER_PAUSE: Duration = Duration::from_millis(50);

/// What entries are applied to.
#[derive(Clone)]
pub(crate) enum Replica {
    /// Tables.
    Full(Group),
    /// Nothing.
    Witness(Arc<AtomicU64>),
}

impl Replica {
    /// The replica of a witness goes on where its log begins: what is before that it had applied.
    pub(crate) fn of_witness(log: &LogStore) -> Self {
        Self::Witness(Arc::new(AtomicU64::new(log.decided().0)))
    }

    fn raise(applied: &AtomicU64, index: LogIndex) {
        applied.fetch_max(index.0, Ordering::AcqRel);
    }
}

impl State for Replica {
    async fn apply(&self, index: LogIndex, command: &Command) -> mainstay_engine::Result<Applied> {
        match self {
            Self::Full(group) => Group::apply(group, index, command).await,
            Self::Witness(applied) => {
                Self::raise(applied, index);
                Ok(Applied { index, response: Ok(Bytes::new()) })
            }
        }
    }

    fn skip(&self, index: LogIndex) {
        match self {
            Self::Full(group) => Group::skip(group, index),
            Self::Witness(applied) => Self::raise(applied, index),
        }
    }

    fn applied(&self) -> LogIndex {
        match self {
            Self::Full(group) => Group::applied(group),
            Self::Witness(applied) => LogIndex(applied.load(Ordering::Acquire)),
        }
    }

    fn flushed(&self) -> LogIndex {
        match self {
            Self::Full(group) => Group::flushed(group),
            Self::Witness(_) => self.applied(),
        }
    }

    fn export(&self) -> mainstay_engine::Result<Exported> {
        match self {
            Self::Full(group) => State::export(group),
            Self::Witness(_) => Ok(Exported { flushed: self.applied(), manifest: Bytes::new(), _pin: None }),
        }
    }

    async fn import(
        &self,
        at: LogIndex,
        manifest: Bytes,
        source: &dyn TableSource,
    ) -> mainstay_engine::Result<LogIndex> {
        match self {
            Self::Full(group) => Group::import(group, manifest, source).await,
            Self::Witness(applied) => {
                // That it stands there is durable in the log then: see `LogStore::begin_install`.
                source.arrived().await?;
                Self::raise(applied, at);
                Ok(at)
            }
        }
    }
}

/// Whether so many of the voters may be witnesses (W4).
pub(crate) fn may_be<'a>(voters: impl Iterator<Item = &'a MemberInfo>) -> Result<()> {
    let (mut all, mut witnesses) = (0, 0);
    for voter in voters {
        all += 1;
        witnesses += usize::from(voter.witness);
    }
    if witnesses > 0 && witnesses * 2 >= all {
        let message = format!("witnesses must be fewer than half of the voters witnesses={witnesses} voters={all}");
        return Err(Error::new(ErrorKind::Invalid, message));
    }
    Ok(())
}

impl<R: Runtime> Inner<R> {
    pub(crate) fn is_witness(&self) -> bool {
        self.options.witness
    }

    /// What a witness answers to who wants data of it.
    pub(crate) fn check_holds_data(&self) -> Result<()> {
        if self.is_witness() {
            return Err(Error::new(ErrorKind::Unavailable, "this member is a witness and holds no data: ask another"));
        }
        Ok(())
    }

    /// The members that hold data.
    pub(crate) fn holders(&self) -> impl Iterator<Item = MemberInfo> {
        self.members().into_iter().filter(|member| !member.witness)
    }

    /// W2: gives leadership away until it is gone.
    pub(crate) async fn give_leadership_away(&self, running: &Arc<Running<R>>) {
        while self.leader_of(running) == Some(running.id) && !self.closing.is_set() {
            match self.handing_over.try_acquire() {
                Ok(_wish) => match self.hand_over(running, None).await {
                    Ok(to) => tracing::info!(to, "a witness handed leadership over"),
                    Err(error) => tracing::debug!(%error, "a witness leads still"),
                },
                Err(_) => tracing::debug!("leadership is being handed over"),
            }
            R::sleep(HAND_OVER_PAUSE).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemberRole;
    use crate::types::Member;

    #[test]
    fn witnesses_are_fewer_than_half_of_the_voters() {
        for (full, witnesses, allowed) in
            [(1, 0, true), (1, 1, false), (2, 1, true), (1, 2, false), (3, 1, true), (2, 2, false), (3, 2, true)]
        {
            let voter = |n: u64| {
                let witness = n >= full;
                Member { witness, ..Member::default() }.info(n, MemberRole::Voter)
            };
            let voters: Vec<MemberInfo> = (0..full + witnesses).map(voter).collect();
            assert_eq!(may_be(voters.iter()).is_ok(), allowed, "{full} and {witnesses}");
        }
    }
}
