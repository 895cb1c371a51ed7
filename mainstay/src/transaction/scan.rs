//! Ordered scans of a transaction: its own writes over the snapshot.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use mainstay_engine::RangeSet;

use super::lock;
use super::reads::{RangeRead, Reads, Seen};
use crate::{Entry, Error, KeyspaceId, Result};

/// An ordered scan of a transaction. It sees what the transaction had written when the scan was made, over the snapshot that the
/// transaction began at. Both ends can be taken from at any time; they meet in the middle and no pair is given twice. After an
/// error it ends.
///
/// What it gives is validated at commit as far as it went: [`crate::Isolation::Serializable`].
pub struct TransactionScan {
    scan: mainstay_engine::Scan,
    /// Own writes that neither end has passed.
    own: BTreeMap<Bytes, Option<Bytes>>,
    /// Ranges that the transaction has removed from the snapshot.
    removed: RangeSet,
    /// Pairs of the snapshot that were taken from it and not given yet, of each end.
    low: Option<Entry>,
    high: Option<Entry>,
    /// Where what was seen is recorded, if it is.
    record: Option<(Arc<Mutex<Reads>>, usize)>,
    /// It gives nothing more, for this reason if there is one.
    ended: Option<Option<Error>>,
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Low,
    High,
}

impl TransactionScan {
    /// `own` is what the transaction has written within the bounds, `removed` the ranges that it has removed before; `reads` are given when what is seen is validated.
    pub(super) fn new(
        scan: mainstay_engine::Scan,
        own: BTreeMap<Bytes, Option<Bytes>>,
        removed: RangeSet,
        reads: Option<&Arc<Mutex<Reads>>>,
        (keyspace, lower, upper): (KeyspaceId, Bound<Bytes>, Bound<Bytes>),
    ) -> Self {
        let mut this = Self { scan, own, removed, low: None, high: None, record: None, ended: None };
        if let Some(reads) = reads {
            let (low, high) = (Seen::default(), Seen::default());
            match lock(reads).add_range(RangeRead { keyspace, lower, upper, low, high, finished: false }) {
                Ok(place) => this.record = Some((reads.clone(), place)),
                Err(error) => this.ended = Some(Some(error)),
            }
        }
        this
    }

    /// The next pair from the low end. Cancel safe.
    ///
    /// # Errors
    /// `Invalid` (the transaction records too much), `Corrupt`, `Io`, `Closed`.
    pub async fn next_async(&mut self) -> Result<Option<Entry>> {
        self.next_of(End::Low).await
    }

    /// The next pair from the high end. Cancel safe.
    ///
    /// # Errors
    /// As [`TransactionScan::next_async`].
    pub async fn next_back_async(&mut self) -> Result<Option<Entry>> {
        self.next_of(End::High).await
    }

    async fn next_of(&mut self, end: End) -> Result<Option<Entry>> {
        if let Some(ended) = &mut self.ended {
            return ended.take().map_or(Ok(None), Err);
        }
        let next = self.merged(end).await;
        if !matches!(next, Ok(Some(_))) {
            self.ended = Some(None);
        }
        next
    }

    /// Of a stored pair and an own write at this end, the nearer; the own write where both are of one key.
    async fn merged(&mut self, end: End) -> Result<Option<Entry>> {
        loop {
            self.fill(end).await?;
            let own = match end {
                End::Low => self.own.first_entry(),
                End::High => self.own.last_entry(),
            };
            let stored = if end == End::Low { &mut self.low } else { &mut self.high };
            let nearer = |own: &Bytes, stored: &Bytes| if end == End::Low { own < stored } else { own > stored };
            let (given, pairs) = match (own, stored.as_ref()) {
                (None, None) => {
                    self.note(|read| read.finished = true)?;
                    return Ok(None);
                }
                (Some(own), stored) if stored.is_none_or(|stored| nearer(own.key(), &stored.key)) => {
                    (own.remove_entry(), 0)
                }
                (Some(own), Some(pair)) if *own.key() == pair.key => {
                    *stored = None;
                    (own.remove_entry(), 1)
                }
                (_, _) => match stored.take() {
                    Some(Entry { key, value }) => {
                        let value = self.removed.at(&key).is_none().then_some(value);
                        ((key, value), 1)
                    }
                    None => continue,
                },
            };
            let (key, value) = given;
            let seen = key.clone();
            self.note(|read| {
                let end = if end == End::Low { &mut read.low } else { &mut read.high };
                end.to = Some(seen);
                end.pairs = end.pairs.saturating_add(pairs);
            })?;
            if let Some(value) = value {
                return Ok(Some(Entry { key, value }));
            }
        }
    }

    /// Takes the next pair of the snapshot at this end, or what the other end has taken and not given.
    async fn fill(&mut self, end: End) -> Result<()> {
        if end == End::Low && self.low.is_none() {
            let next = self.scan.next().await?.map(|(key, value)| Entry { key, value });
            self.low = next.or_else(|| self.high.take());
        }
        if end == End::High && self.high.is_none() {
            let next = self.scan.next_back().await?.map(|(key, value)| Entry { key, value });
            self.high = next.or_else(|| self.low.take());
        }
        Ok(())
    }

    fn note(&self, step: impl FnOnce(&mut RangeRead)) -> Result<()> {
        match &self.record {
            Some((reads, place)) => lock(reads).advance(*place, step),
            None => Ok(()),
        }
    }
}

impl Iterator for TransactionScan {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        mainstay_io::block_on(self.next_async()).transpose()
    }
}

impl DoubleEndedIterator for TransactionScan {
    fn next_back(&mut self) -> Option<Self::Item> {
        mainstay_io::block_on(self.next_back_async()).transpose()
    }
}
