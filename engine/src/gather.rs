//! Reads of many lookups, gathered and then handed to the device together.
//!
//! # Place
//! below `table` and `volume`; `read` makes one for each call that looks up many keys
//! # Invariants
//! 1. A gathered read is complete only once it was submitted: who polls it before sees it pending, and is not woken.
//!    [`Gather::run`] polls again.
//! 2. What was gathered in a poll is submitted before that poll ends: others may wait for a block that is read here.
//! # Why not
//! Reads that start where they are asked for, as those of single lookups do: each of them is handed to the ring by itself, which
//! wakes its thread at the first and calls the kernel for those that it happens to find.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use mainstay_io::{AlignedBuf, AlignedBytes, IoClass, Zone};

use crate::Result;

/// Reads of one zone that wait to be submitted.
#[derive(Default)]
pub(crate) struct Gather(Mutex<Gathered>);

#[derive(Default)]
struct Gathered {
    /// All reads of a snapshot are of the extents of one volume.
    zone: Option<Zone>,
    reads: Vec<(u64, AlignedBuf)>,
    slots: Vec<Arc<Slot>>,
}

/// Where the answer to a read is put.
#[derive(Default)]
struct Slot(Mutex<Option<mainstay_io::Result<AlignedBytes>>>);

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Option<mainstay_io::Result<AlignedBytes>>> {
        // Every change is one assignment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gather {
    /// Adds a read; see invariant 1. The same range is read once: many lookups begin with one index.
    pub(crate) fn read(
        &self,
        zone: &Zone,
        offset: u64,
        bytes: usize,
    ) -> impl Future<Output = mainstay_io::Result<AlignedBytes>> + Send + use<> {
        let mut gathered = self.lock();
        gathered.zone.get_or_insert_with(|| zone.clone());
        let known = gathered.reads.iter().position(|(at, buf)| *at == offset && buf.len() == bytes);
        let known = known.and_then(|place| gathered.slots.get(place).cloned());
        let slot = known.unwrap_or_else(|| {
            let slot = Arc::<Slot>::default();
            gathered.reads.push((offset, AlignedBuf::zeroed(bytes)));
            gathered.slots.push(slot.clone());
            slot
        });
        drop(gathered);
        poll_fn(move |_| slot.lock().clone().map_or(Poll::Pending, Poll::Ready))
    }

    /// Runs the lookups, `max` of them at a time, which add their reads here. When none of those that are open goes on without the
    /// device it gets what they wait for, all of it together.
    ///
    /// # Cancel safety
    /// Cancel safe where the lookups are.
    pub(crate) async fn run<T, F>(&self, lookups: impl Iterator<Item = F>, max: usize) -> Result<Vec<T>>
    where
        F: Future<Output = Result<T>>,
    {
        let mut lookups = lookups.fuse();
        let mut found = Vec::with_capacity(lookups.size_hint().0);
        let mut open: Vec<Pin<Box<F>>> = Vec::new();
        // The place of one that is over is for the next: most need nothing of the device, and are over at once.
        let mut spare: Option<Pin<Box<F>>> = None;
        loop {
            poll_fn(|cx| {
                let mut failed = None;
                let mut is_open = |lookup: &mut Pin<Box<F>>| match lookup.as_mut().poll(cx) {
                    Poll::Pending => true,
                    Poll::Ready(Ok(one)) => {
                        found.push(one);
                        false
                    }
                    Poll::Ready(Err(error)) => {
                        failed.get_or_insert(error);
                        false
                    }
                };
                // In their order: who waits for a block that another one reads comes behind that one.
                open.retain_mut(&mut is_open);
                while open.len() < max
                    && let Some(lookup) = lookups.next()
                {
                    let mut next = match spare.take() {
                        Some(mut place) => {
                            place.set(lookup);
                            place
                        }
                        None => Box::pin(lookup),
                    };
                    if is_open(&mut next) { open.push(next) } else { spare = Some(next) }
                }
                match failed {
                    Some(error) => Poll::Ready(Err(error)),
                    // What is open and reads nothing here waits for the read of another call.
                    None if !open.is_empty() && self.lock().reads.is_empty() => Poll::Pending,
                    None => Poll::Ready(Ok(())),
                }
            })
            .await?;
            if open.is_empty() {
                return Ok(found);
            }
            self.submit().await;
        }
    }

    /// Hands the device what was gathered, and waits until all of it is answered.
    async fn submit(&self) {
        let Gathered { zone, reads, slots } = std::mem::take(&mut *self.lock());
        let Some(zone) = zone else { return };
        for (read, slot) in zone.read_many(reads, IoClass::Foreground).into_iter().zip(slots) {
            let answer = read.await.map(AlignedBuf::freeze);
            *slot.lock() = Some(answer);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
