//! The log of a store alone on one node: the same entries, the same records, one voter.

use mainstay_wal::GroupId;

use crate::{Applied, Command, Engine, Group, OwnerRecord, Result};

/// Proposes to a group that has no other replica. Cloning gives another handle.
#[derive(Clone)]
pub struct LocalLog {}

impl LocalLog {
    /// Replays the entries found at open, then takes proposals: each is durable in the log before it is applied.
    pub async fn open(
        engine: &Engine,
        group: GroupId,
        settings: crate::GroupSettings,
        found: Vec<OwnerRecord>,
    ) -> Result<Self> {
        let _ = (engine, group, settings, found);
        todo!()
    }

    /// The group it drives.
    pub fn group(&self) -> &Group {
        todo!()
    }

    /// Appends the command, waits until it is durable and applied, and returns the answer.
    ///
    /// # Cancel safety
    /// Not cancel safe: a dropped future may leave the command in the log.
    pub async fn propose(&self, command: Command) -> Result<Applied> {
        let _ = command;
        todo!()
    }

    /// Waits for what was proposed and ends the applier.
    pub async fn close(&self) -> Result<()> {
        todo!()
    }
}
