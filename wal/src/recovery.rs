//! Walks the log from its start, decides where it ends, and wipes what the cut leaves behind.
//!
//! # Place
//! above `cases`, which decides; used by `Wal::open` and by the offline reader
//! # Invariants
//! 1. Only bytes that survive a loss of power are read: the zone is flushed first, since a killed process may have left
//!    writes in the device's cache.
//! 2. After [`cut`] no header of this volume lies at or behind the end of the log. So whatever carries such a position
//!    later was written by a later epoch, and nothing that was cut can be adopted when its predecessor's place is
//!    filled again, also when the start has moved up to it and its chain cannot be checked.
//! 3. Memory is bounded by one longest batch and one read-ahead chunk.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::collections::BTreeSet;

use mainstay_io::{AlignedBuf, AlignedBytes, BLOCK_BYTES, IoClass, WriteMode, Zone};

use crate::batch::{Header, WAL_FORMAT_VERSION};
use crate::cases::{Facts, Found, Tail, Verdict, decide, needs_scan};
use crate::ring::Ring;
use crate::{Error, ErrorKind, Lsn, Result};

/// Bytes of one read-ahead.
const CHUNK_BYTES: u64 = 1 << 20;
/// How often a block is asked for on its own when the device fails to read it.
const BLOCK_READS: usize = 3;
const BLOCK: u64 = BLOCK_BYTES as u64;

/// What is known before the walk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expect {
    pub(crate) volume: [u8; 16],
    pub(crate) start: Lsn,
    /// Every epoch in the log is below this.
    pub(crate) epoch_limit: u64,
    pub(crate) clean_end: Option<Lsn>,
    /// Nobody has opened the log since it was closed at `clean_end`.
    pub(crate) closed: bool,
    /// Go on behind acknowledged bytes that are damaged (rows K, L and P): the owner has them from elsewhere.
    pub(crate) holes: bool,
}

/// What the walk meets.
pub(crate) enum Step {
    /// A whole batch.
    Batch(Header, AlignedBytes),
    /// Acknowledged bytes that are damaged. With the header and all bytes of the batch when the header is whole.
    Hole { from: Lsn, batch: Option<(Header, AlignedBytes)> },
}

/// Where the log ends and what lies behind.
#[derive(Clone, Debug)]
pub(crate) struct Ending {
    pub(crate) end: Lsn,
    /// Checksum of the last batch, when there is one.
    pub(crate) chain: Option<u64>,
    pub(crate) batches: u64,
    pub(crate) torn_bytes: u64,
    /// Positions of headers behind the end.
    pub(crate) left_over: Vec<Lsn>,
}

/// Reads positions of a zone with read-ahead.
pub(crate) struct Reader {
    zone: Zone,
    ring: Ring,
    /// No position at or behind this one can hold a batch.
    limit: Lsn,
    class: IoClass,
    chunk: Option<(Lsn, AlignedBytes)>,
    /// Blocks that the device did not give.
    unread: BTreeSet<Lsn>,
}

impl Reader {
    pub(crate) fn new(zone: Zone, ring: Ring, limit: Lsn, class: IoClass) -> Self {
        Self { zone, ring, limit, class, chunk: None, unread: BTreeSet::new() }
    }

    /// `length` bytes at `lsn`; None when they would pass the lap's end or the limit.
    pub(crate) async fn read(&mut self, lsn: Lsn, length: u64) -> Result<Option<AlignedBytes>> {
        let rest = self.ring.lap_rest(lsn).min(self.limit.0.saturating_sub(lsn.0));
        if length > rest {
            return Ok(None);
        }
        if let Some(found) = self.cached(lsn, length) {
            return Ok(Some(found));
        }
        let bytes = length.max(CHUNK_BYTES.min(rest));
        let buf = AlignedBuf::zeroed(usize::try_from(bytes).unwrap_or(usize::MAX));
        let chunk = match self.zone.read(self.ring.place(lsn), buf, self.class).await {
            Err(error) if error.kind() == mainstay_io::ErrorKind::Media => self.read_blocks(lsn, bytes).await?,
            read => read?.freeze(),
        };
        self.chunk = Some((lsn, chunk));
        Ok(self.cached(lsn, length))
    }

    /// Block by block, with zeroes for those that cannot be read: they are judged as damaged.
    async fn read_blocks(&mut self, lsn: Lsn, bytes: u64) -> Result<AlignedBytes> {
        let mut whole = AlignedBuf::zeroed(usize::try_from(bytes).unwrap_or(usize::MAX));
        let mut lsn = lsn;
        for part in whole.chunks_mut(BLOCK_BYTES) {
            match self.read_block(lsn).await? {
                Some(block) => part.copy_from_slice(block.get(..part.len()).unwrap_or_default()),
                None => drop(self.unread.insert(lsn)),
            }
            lsn = Lsn(lsn.0.saturating_add(BLOCK));
        }
        Ok(whole.freeze())
    }

    /// None when the device does not give it, asked [`BLOCK_READS`] times.
    async fn read_block(&self, lsn: Lsn) -> Result<Option<AlignedBuf>> {
        for _ in 0..BLOCK_READS {
            match self.zone.read(self.ring.place(lsn), AlignedBuf::zeroed(BLOCK_BYTES), self.class).await {
                Ok(block) => return Ok(Some(block)),
                Err(error) if error.kind() == mainstay_io::ErrorKind::Media => {
                    tracing::warn!(lsn = lsn.0, %error, "a block of the log cannot be read");
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    /// Whether the device did not give one of the blocks at `lsn`, which were asked for before.
    fn misses(&self, lsn: Lsn, length: u64) -> bool {
        self.unread.range(lsn..Lsn(lsn.0.saturating_add(length))).next().is_some()
    }

    fn cached(&self, lsn: Lsn, length: u64) -> Option<AlignedBytes> {
        let (from, chunk) = self.chunk.as_ref()?;
        let begin = usize::try_from(lsn.0.checked_sub(from.0)?).ok()?;
        let end = begin.checked_add(usize::try_from(length).ok()?)?;
        (end <= chunk.len()).then(|| chunk.slice(begin..end))
    }

    /// Where the blocks that the device does not give end, from `lsn` on.
    async fn behind_unread(&mut self, lsn: Lsn) -> Result<Lsn> {
        let mut lsn = lsn;
        while self.read(lsn, BLOCK).await?.is_some() && self.misses(lsn, BLOCK) {
            lsn = Lsn(lsn.0.saturating_add(BLOCK));
        }
        Ok(lsn)
    }

    pub(crate) async fn header(&mut self, lsn: Lsn) -> Result<Option<Header>> {
        Ok(self.read(lsn, BLOCK).await?.and_then(|block| Header::decode(&block)))
    }
}

/// Walks the log and hands every batch to `visit` in order. Writes nothing.
///
/// # Errors
/// `Corrupt` naming the position, `Foreign`, `Io`, `Invalid`, or what `visit` answered.
pub(crate) async fn walk(
    zone: &Zone,
    expect: &Expect,
    visit: &mut (dyn FnMut(Step) -> Result<()> + Send),
) -> Result<Ending> {
    let ring = Ring::new(zone.length())?;
    if !expect.start.0.is_multiple_of(BLOCK) || expect.start.0.checked_add(ring.bytes().saturating_mul(4)).is_none() {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("the start is no position of a log start={}", expect.start),
        ));
    }
    let limit = Lsn(expect.start.0.saturating_add(ring.bytes()));
    let mut reader = Reader::new(zone.clone(), ring, limit, IoClass::Foreground);
    let mut tail = Tail { end: expect.start, chain: None, epoch: 0 };
    let mut batches = 0_u64;
    let mut damaged = false;
    loop {
        let (at, found) = examine(&mut reader, expect, &tail, tail.end).await?;
        let mut torn = found.as_ref().filter(|_| at == Found::Torn).map(|(header, _)| *header);
        let mut adopted = found;
        let mut lap = Found::Nothing;
        let mut scan = Scan::default();
        if at != Found::Good {
            if let Some(next) = ring.lap_next(tail.end) {
                (lap, adopted) = examine(&mut reader, expect, &tail, next).await?;
                torn = torn.or(adopted.as_ref().filter(|_| lap == Found::Torn).map(|(header, _)| *header));
            }
            if needs_scan(at, lap) {
                scan = scan_window(&mut reader, expect, &tail).await?;
            }
        }
        let short = expect.clean_end.is_some_and(|clean| tail.end < clean);
        let unread = unread_at(&reader, &ring, &tail, torn.as_ref());
        // Of a log that was closed cleanly, and not opened since, it is known what was there.
        let doubt = !expect.closed && (unread.is_some() || (torn.is_some() && damaged));
        let row = decide(&Facts { at, lap, proof: scan.proof, short, doubt });
        tracing::trace!(lsn = tail.end.0, row = %row.letter, "log position judged");
        let bad = if lap == Found::Nothing { tail.end } else { ring.lap_next(tail.end).unwrap_or(tail.end) };
        match row.verdict {
            Verdict::Adopt | Verdict::AdoptLap => {
                let (header, batch) = adopted.expect("a batch was found good only with its bytes");
                let (end, checksum, epoch) = (header.end(), header.checksum, header.epoch);
                visit(Step::Batch(header, batch))?;
                tail = Tail { end, chain: Some(checksum), epoch };
                batches = batches.saturating_add(1);
            }
            Verdict::CutEnd | Verdict::CutTorn => {
                let torn_bytes = scan.reach.0.saturating_sub(tail.end.0);
                let left_over = scan.headers;
                return Ok(Ending { end: tail.end, chain: tail.chain, batches, torn_bytes, left_over });
            }
            Verdict::Corrupt if mainstay_io::mutant!(HoleIsTail) => {
                let left_over = scan.headers;
                return Ok(Ending { end: tail.end, chain: tail.chain, batches, torn_bytes: 0, left_over });
            }
            Verdict::Corrupt if expect.holes => {
                let from = tail.end;
                damaged = true;
                let batch = match torn {
                    Some(header) => reader.read(header.lsn, u64::from(header.batch_bytes)).await?.map(|b| (header, b)),
                    None => None,
                };
                tail = match (torn, expect.clean_end) {
                    // The header is whole, and its checksum covers that of the body: the chain is not broken.
                    (Some(header), _) => Tail { end: header.end(), chain: Some(header.checksum), epoch: header.epoch },
                    // No header of an earlier lap, and none that was cut, says that it lies here (invariant 2).
                    (None, clean_end) => {
                        let clean_end = clean_end.filter(|clean| tail.end < *clean);
                        let end = match (scan.next.or(clean_end), unread) {
                            (Some(end), _) => end,
                            (None, Some(unread)) => reader.behind_unread(unread).await?,
                            (None, None) => return Err(corrupt(bad, row.letter, "nothing says where the log goes on")),
                        };
                        Tail { end, chain: None, epoch: tail.epoch }
                    }
                };
                tracing::warn!(from = from.0, to = tail.end.0, row = %row.letter, "acknowledged bytes are damaged");
                visit(Step::Hole { from, batch })?;
            }
            Verdict::Corrupt => {
                let cause = match (scan.proof, short) {
                    (true, _) => "a later batch says it was durable",
                    (false, true) => "the log was closed cleanly",
                    (false, false) => "the device does not give them",
                };
                return Err(corrupt(bad, row.letter, &format!("acknowledged bytes are damaged, {cause}")));
            }
            Verdict::CorruptBefore => {
                let message = "the batch here follows another one than the batch before it; a write was lost";
                return Err(corrupt(tail.end, row.letter, message));
            }
            Verdict::SuperblockOld => {
                let message = "the log was written under a later epoch than the superblock knows";
                return Err(corrupt(bad, row.letter, message));
            }
            Verdict::NewerFormat => {
                let message = format!("the log has a newer format than {WAL_FORMAT_VERSION}, use a newer release");
                return Err(foreign(bad, row.letter, &message));
            }
            Verdict::OtherVolume => return Err(foreign(bad, row.letter, "the log belongs to another volume")),
        }
    }
}

/// The first block that the device does not give and in which the next batch may lie.
fn unread_at(reader: &Reader, ring: &Ring, tail: &Tail, torn: Option<&Header>) -> Option<Lsn> {
    let begins = [Some(tail.end), ring.lap_next(tail.end)].into_iter().flatten();
    let unread = begins.into_iter().find(|begin| reader.misses(*begin, BLOCK));
    unread
        .or_else(|| torn.filter(|header| reader.misses(header.lsn, header.batch_bytes.into())).map(|header| header.lsn))
}

fn corrupt(lsn: Lsn, row: char, message: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{message} lsn={lsn} case={row}"))
}

fn foreign(lsn: Lsn, row: char, message: &str) -> Error {
    Error::new(ErrorKind::Foreign, format!("{message} lsn={lsn} case={row}"))
}

/// Judges what lies at `lsn`, which is the end of the tail or the start of the lap behind it.
async fn examine(
    reader: &mut Reader,
    expect: &Expect,
    tail: &Tail,
    lsn: Lsn,
) -> Result<(Found, Option<(Header, AlignedBytes)>)> {
    let Some(header) = reader.header(lsn).await? else { return Ok((Found::Nothing, None)) };
    if header.volume != expect.volume {
        return Ok((Found::Other, None));
    }
    if header.lsn != lsn {
        return Ok((Found::Nothing, None));
    }
    if header.version > WAL_FORMAT_VERSION {
        return Ok((Found::Newer, None));
    }
    if header.epoch >= expect.epoch_limit {
        return Ok((Found::Future, None));
    }
    if header.epoch < tail.epoch {
        return Ok((Found::Nothing, None));
    }
    // Behind a skipped lap end only the batch that says so is a neighbour. The first batch of a log may itself have
    // skipped a lap end that is released since.
    let first = tail.chain.is_none() && lsn == tail.end;
    if !first && header.follows != tail.end {
        return Ok((Found::Nothing, None));
    }
    // Written behind what the device did not give when the log was opened, and gives now.
    let anew = header.chain == 0 && header.epoch > tail.epoch;
    if !anew && tail.chain.is_some_and(|chain| chain != header.chain) {
        let contradicts = header.durable == tail.end;
        return Ok((if contradicts { Found::Contradicts } else { Found::Nothing }, None));
    }
    match reader.read(lsn, u64::from(header.batch_bytes)).await? {
        Some(batch) if header.body_matches(&batch) => Ok((Found::Good, Some((header, batch)))),
        Some(batch) => Ok((Found::Torn, Some((header, batch)))),
        None => Ok((Found::Torn, None)),
    }
}

/// What lies behind the end.
#[derive(Default)]
struct Scan {
    proof: bool,
    headers: Vec<Lsn>,
    reach: Lsn,
    /// The first batch that may be the next one, when those before it are lost.
    next: Option<Lsn>,
}

/// Looks at every block that a batch in flight together with one at the end of the tail can begin at.
async fn scan_window(reader: &mut Reader, expect: &Expect, tail: &Tail) -> Result<Scan> {
    let mut scan = Scan { reach: tail.end, ..Scan::default() };
    let last = Lsn(tail.end.0.saturating_add(reader.ring.window_bytes())).min(reader.limit);
    let mut lsn = tail.end;
    while lsn < last {
        if let Some(header) = reader.header(lsn).await?
            && header.volume == expect.volume
            && header.lsn == lsn
            && header.version <= WAL_FORMAT_VERSION
        {
            scan.proof |= header.epoch >= tail.epoch && header.durable > tail.end;
            if lsn > tail.end && header.epoch >= tail.epoch && header.epoch < expect.epoch_limit {
                scan.next = scan.next.or(Some(lsn));
            }
            scan.reach = scan.reach.max(header.end());
            scan.headers.push(lsn);
        }
        lsn = Lsn(lsn.0.saturating_add(BLOCK));
    }
    Ok(scan)
}

/// Makes invariant 2 hold: the headers behind the end are overwritten with zeroes, durably, before anything is written.
pub(crate) async fn cut(zone: &Zone, ending: &Ending) -> Result<()> {
    let ring = Ring::new(zone.length())?;
    for &lsn in &ending.left_over {
        let zeroes = vec![AlignedBuf::zeroed(BLOCK_BYTES).freeze()];
        zone.write(ring.place(lsn), zeroes, WriteMode::Durable, IoClass::Wal).await?;
    }
    Ok(())
}
