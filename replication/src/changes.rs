//! The entries of a replica, for readers of [`mainstay_engine::Changes`].
//!
//! # Place
//! above the log store; only entries that are applied here are asked for, so none of them is ever truncated

use mainstay_engine::{Changes, Command, Entries, EntryPlace, EntrySource, Error, ErrorKind, LogIndex, Result};
use mainstay_io::BoxFuture;

use crate::log_store::{LogStore, READ_BYTES_MAX};
use crate::types::EntryPayload;
use crate::{Node, Runtime};

/// Entries of one read.
const ENTRIES_MAX: u64 = 1024;

impl EntrySource for LogStore {
    fn read(&self, from: LogIndex, applied: LogIndex, _: EntryPlace) -> BoxFuture<Result<Entries>> {
        let this = self.clone();
        Box::pin(async move {
            let end = applied.0.saturating_add(1).min(from.0.saturating_add(ENTRIES_MAX));
            let found = this.read_entries(from.0..end, READ_BYTES_MAX).await;
            // Asked behind the read: it may have been purged meanwhile.
            let oldest = LogIndex(this.first_index());
            if from < oldest {
                return Err(Error::new(
                    ErrorKind::Purged { oldest },
                    format!(
                        "the log does not reach back so far: begin anew from a snapshot from={from} oldest={oldest}"
                    ),
                ));
            }
            let unread = |error: std::io::Error| Error::new(ErrorKind::Io, format!("the log cannot be read: {error}"));
            let mut entries = Entries { next: from, ..Entries::default() };
            for entry in found.map_err(unread)? {
                let index = LogIndex(entry.log_id.index);
                if index != entries.next {
                    let message = format!("an entry is not in the log index={} found={index}", entries.next);
                    return Err(Error::new(ErrorKind::Unavailable, message));
                }
                if let EntryPayload::Normal(payload) = &entry.payload {
                    entries.commands.push((index, Command::decode(&payload.bytes)?));
                }
                entries.next = LogIndex(index.0.saturating_add(1));
            }
            if entries.next == from {
                return Err(Error::new(ErrorKind::Unavailable, format!("an entry is not in the log index={from}")));
            }
            Ok(entries)
        })
    }
}

impl<R: Runtime> Node<R> {
    /// The changes of a branch from entry `from` on, as this replica applies them: whatever its role. See [`Changes`].
    ///
    /// # Errors
    /// `NotFound` when there is no such branch here, and as [`Changes::open`]; `Unsupported` of a witness.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn changes(&self, branch: &str, from: LogIndex) -> crate::Result<Changes> {
        if self.inner.options.witness {
            return Err(crate::Error::new(ErrorKind::Unsupported, "a witness holds no data"));
        }
        let id = self.inner.group.branch(branch);
        let id = id.ok_or_else(|| crate::Error::new(ErrorKind::NotFound, format!("no such branch name={branch}")))?;
        let source = std::sync::Arc::new(self.inner.log.clone());
        Ok(Changes::open(self.inner.group.clone(), id, source, from).await?)
    }
}
