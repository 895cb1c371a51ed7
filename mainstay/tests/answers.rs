//! The same operations on other engines and under other settings: the answers are equal.
//!
//! A seed makes a sequence of operations: writes, removed ranges, batches, conditions, transactions, reads in every way, pinned snapshots,
//! checkpoints, clones, keyspaces dropped and made again, compactions, closes and kills. What each answers is compared with what redb
//! answers, whose tables stand for the keyspaces of each branch and checkpoint, and between stores of other settings.
//! `MAINSTAY_ANSWERS_SEEDS` says how many seeds: docs/testing.md.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::path::{Path, PathBuf};

use mainstay::{
    BackendChoice, Batch, Durability, Entry, ErrorKind, Isolation, Keyspace, OperatorId, Result, Snapshot, Store,
    TableCompression,
};
use mainstay_io::block_on;
use mainstay_io::sim::{SimLayout, SimMedia, SimOptions, SimRandom};
use redb::{Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

const OPERATIONS: u64 = 200;
const KEYSPACES: u64 = 3;

/// An operation on something that exists or not: that is part of the answer.
#[derive(Clone, Debug)]
enum Op {
    Write {
        place: Place,
        mutations: Vec<Mutation>,
    },
    /// The mutations, if the key has this value, or none.
    WriteIf {
        place: Place,
        key: String,
        value: Option<Vec<u8>>,
        mutations: Vec<Mutation>,
    },
    /// Reads the key, then mutates; somebody else writes the other key in between.
    Transact {
        place: Place,
        read: String,
        other: String,
        value: Vec<u8>,
        mutations: Vec<Mutation>,
    },
    DropKeyspace(u64),
    Get {
        view: View,
        keyspace: u64,
        key: String,
    },
    Scan {
        view: View,
        keyspace: u64,
        bounds: Bounds,
        way: Way,
    },
    Pin(String),
    Unpin,
    Checkpoint {
        name: String,
        branch: String,
    },
    DropCheckpoint(String),
    Clone {
        name: String,
        checkpoint: String,
    },
    DropClone(String),
    /// Changes nothing that can be seen.
    Compact(Place),
    Close,
    Kill,
}

#[derive(Clone, Debug)]
struct Place {
    branch: String,
    keyspace: u64,
}

#[derive(Clone, Debug)]
enum Mutation {
    Put(String, Vec<u8>),
    Remove(String),
    RemoveRange(String, String),
    /// An operand that is appended.
    Append(String, Vec<u8>),
}

type Bounds = (Bound<Vec<u8>>, Bound<Vec<u8>>);

/// What is read.
#[derive(Clone, Debug)]
enum View {
    Branch(String),
    Checkpoint(String),
    Pinned,
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Forward,
    Back,
    /// From both ends in turn.
    Ends,
    Visit,
}

#[derive(Clone, Debug, PartialEq)]
enum Answer {
    Done,
    Refused(ErrorKind),
    Value(Option<Vec<u8>>),
    Pairs(Vec<(Vec<u8>, Vec<u8>)>),
}

/// Something that answers operations.
trait Subject {
    fn answer(&mut self, op: &Op) -> Answer;
}

/// The operations of a seed.
fn operations(seed: u64) -> Vec<Op> {
    let random = SimRandom::new(seed);
    let name = |of: &str| format!("{of}{}", random.below(2));
    let branch = || if random.below(3) == 0 { name("clone") } else { "main".to_owned() };
    let key = || match random.below(70) {
        n if n % 5 == 0 => format!("a-prefix-of-many-keys/{n:03}"),
        n => format!("key-{n:03}"),
    };
    let value = |n: u64| n.to_le_bytes().repeat(random.below(60) as usize);
    let place = || Place { branch: branch(), keyspace: random.below(KEYSPACES) };
    let mutation = |n: u64| match random.below(12) {
        0 => {
            let (a, b) = (key(), key());
            Mutation::RemoveRange(a.clone().min(b.clone()), a.max(b) + "~")
        }
        1..4 => Mutation::Remove(key()),
        4..6 => Mutation::Append(key(), value(n)),
        _ => Mutation::Put(key(), value(n)),
    };
    let mutations = |n: u64| (0..1 + random.below(5)).map(|_| mutation(n)).collect::<Vec<_>>();
    let view = || match random.below(6) {
        0 => View::Checkpoint(name("checkpoint")),
        1 => View::Pinned,
        _ => View::Branch(branch()),
    };
    let bound = |text: String| match random.below(3) {
        0 => Bound::Included(text.into_bytes()),
        1 => Bound::Excluded(text.into_bytes()),
        _ => Bound::Unbounded,
    };
    let bounds = || {
        let (a, b) = (key(), key());
        (bound(a.clone().min(b.clone())), bound(a.max(b) + "~"))
    };
    let way = || [Way::Forward, Way::Back, Way::Ends, Way::Visit][random.below(4) as usize];
    let one = |n: u64| match random.below(100) {
        0..35 => Op::Write { place: place(), mutations: mutations(n) },
        35..42 => {
            // Short values are often met again.
            let value = (random.below(2) == 0).then(Vec::new);
            Op::WriteIf { place: place(), key: key(), value, mutations: mutations(n) }
        }
        42..48 => {
            let (read, other) = (key(), key());
            Op::Transact { place: place(), read, other, value: value(n), mutations: mutations(n) }
        }
        48..50 => Op::DropKeyspace(random.below(KEYSPACES)),
        50..62 => Op::Get { view: view(), keyspace: random.below(KEYSPACES), key: key() },
        62..76 => Op::Scan { view: view(), keyspace: random.below(KEYSPACES), bounds: bounds(), way: way() },
        76..78 => Op::Pin(branch()),
        78..79 => Op::Unpin,
        79..83 => Op::Checkpoint { name: name("checkpoint"), branch: branch() },
        83..85 => Op::DropCheckpoint(name("checkpoint")),
        85..89 => Op::Clone { name: name("clone"), checkpoint: name("checkpoint") },
        89..91 => Op::DropClone(name("clone")),
        91..95 => Op::Compact(place()),
        95..98 => Op::Close,
        _ => Op::Kill,
    };
    let mut all: Vec<Op> = (0..OPERATIONS).map(one).collect();
    for place in ["main", "clone0", "clone1", "checkpoint0", "checkpoint1"] {
        for keyspace in 0..KEYSPACES {
            let of = place.to_owned();
            let view = if place.starts_with("check") { View::Checkpoint(of) } else { View::Branch(of) };
            all.push(Op::Scan { view, keyspace, bounds: (Bound::Unbounded, Bound::Unbounded), way: Way::Forward });
        }
    }
    all
}

/// What may differ between two stores that answer alike.
#[derive(Clone, Debug)]
struct Tuning {
    name: &'static str,
    memory_bytes: u64,
    memtable_bytes: u64,
    table_bytes: u64,
    background_tasks: usize,
    wal_in_flight_max: usize,
    compression: TableCompression,
    durability: Durability,
    /// None for a simulated disk.
    backend: Option<BackendChoice>,
    /// Mutations are committed one by one where nothing tells the difference.
    one_by_one: bool,
    /// Everything is compacted after so many operations.
    compact_every: usize,
}

impl Tuning {
    fn plain() -> Self {
        Self {
            name: "plain",
            memory_bytes: 64 << 20,
            memtable_bytes: 64 << 20,
            table_bytes: 8 << 20,
            background_tasks: 1,
            wal_in_flight_max: 3,
            compression: TableCompression::None,
            durability: Durability::Quorum,
            backend: None,
            one_by_one: false,
            compact_every: usize::MAX,
        }
    }

    /// Flushes and compactions all the time.
    fn busy(name: &'static str) -> Self {
        let compression = TableCompression::ByLevel;
        Self { name, memtable_bytes: 4 << 10, table_bytes: 8 << 10, compression, ..Self::plain() }
    }

    fn all() -> Vec<Self> {
        vec![
            Self { background_tasks: 3, ..Self::busy("busy") },
            Self { memory_bytes: 16 << 20, wal_in_flight_max: 1, ..Self::busy("little memory") },
            Self { compression: TableCompression::Lz4, durability: Durability::Local, ..Self::busy("lz4, local") },
            Self { durability: Durability::All, wal_in_flight_max: 8, ..Self::busy("all") },
            Self { backend: Some(BackendChoice::Threads), ..Self::busy("threads") },
            Self { backend: Some(BackendChoice::Auto), ..Self::busy("io_uring where there is one") },
            Self { one_by_one: true, ..Self::busy("one by one") },
            Self { compact_every: 7, ..Self::busy("compacted often") },
        ]
    }
}

/// A store of ours.
struct Ours {
    tuning: Tuning,
    folder: PathBuf,
    media: SimMedia,
    store: Option<Store>,
    pinned: Option<Snapshot>,
    done: usize,
}

impl Ours {
    fn new(tuning: Tuning, folder: &Path) -> Self {
        let options = SimOptions { capacity: 1 << 30, ..SimOptions::default() };
        let media = SimMedia::with_layout(SimLayout::Directory, options);
        let mut new = Self { tuning, folder: folder.join("ours"), media, store: None, pinned: None, done: 0 };
        new.open();
        new
    }

    fn open(&mut self) {
        let tuning = &self.tuning;
        let builder = Store::builder()
            .wal_bytes(4 << 20)
            .memory_bytes(tuning.memory_bytes)
            .memtable_bytes(tuning.memtable_bytes)
            .table_bytes(tuning.table_bytes)
            .background_tasks(tuning.background_tasks)
            .wal_in_flight_max(tuning.wal_in_flight_max)
            .compression(tuning.compression);
        let store = match tuning.backend {
            Some(backend) => builder.backend(backend).open(&self.folder),
            None => block_on(builder.open_media(self.media.open().expect("nobody else holds it"))),
        };
        self.store = Some(store.expect("it opens").with_durability(tuning.durability.clone()));
    }

    fn store(&self) -> &Store {
        self.store.as_ref().expect("it is open")
    }

    fn keyspace(&self, place: &Place) -> Result<Keyspace> {
        let branch = self.store().open_clone(&place.branch)?;
        branch.keyspace_with_operator(&format!("keyspace-{}", place.keyspace), OperatorId::APPEND)
    }

    fn view(&self, view: &View) -> Result<Option<Snapshot>> {
        Ok(match view {
            View::Branch(name) => Some(self.store().open_clone(name)?.snapshot()?),
            View::Checkpoint(name) => Some(self.store().open_checkpoint(name)?),
            View::Pinned => self.pinned.clone(),
        })
    }

    fn write(&self, keyspace: &Keyspace, mutations: &[Mutation], batch: &mut Batch) -> Result<()> {
        let mut batches = vec![std::mem::take(batch)];
        for mutation in mutations {
            if self.tuning.one_by_one && batches[0].is_empty() {
                batches.push(Batch::new());
            }
            let batch = batches.last_mut().expect("there is one");
            match mutation {
                Mutation::Put(key, value) => batch.insert(keyspace, key, value),
                Mutation::Remove(key) => batch.remove(keyspace, key),
                Mutation::RemoveRange(from, to) => batch.remove_range(keyspace, from.as_str()..to),
                Mutation::Append(key, operand) => batch.merge(keyspace, key, operand),
            };
        }
        batches
            .into_iter()
            .filter(|batch| !batch.is_empty())
            .try_for_each(|batch| keyspace.store().commit(batch).map(drop))
    }

    fn run(&mut self, op: &Op) -> Result<Answer> {
        match op {
            Op::Write { place, mutations } => self.write(&self.keyspace(place)?, mutations, &mut Batch::new())?,
            Op::WriteIf { place, key, value, mutations } => {
                let (keyspace, mut batch) = (self.keyspace(place)?, Batch::new());
                match value {
                    Some(value) => batch.require_value(&keyspace, key, value),
                    None => batch.require_absent(&keyspace, key),
                };
                self.write(&keyspace, mutations, &mut batch)?;
            }
            Op::Transact { place, read, other, value, mutations } => {
                let keyspace = self.keyspace(place)?;
                let mut transaction = keyspace.store().transaction(Isolation::Serializable)?;
                transaction.get(&keyspace, read)?;
                keyspace.insert(other, value)?;
                for mutation in mutations {
                    match mutation {
                        Mutation::Put(key, value) => transaction.insert(&keyspace, key, value)?,
                        Mutation::Remove(key) => transaction.remove(&keyspace, key)?,
                        Mutation::RemoveRange(from, to) => transaction.remove_range(&keyspace, from.as_str()..to)?,
                        Mutation::Append(key, operand) => transaction.merge(&keyspace, key, operand)?,
                    }
                }
                transaction.commit()?;
            }
            Op::DropKeyspace(keyspace) => {
                let name = format!("keyspace-{keyspace}");
                self.store().keyspace(&name)?;
                self.store().drop_keyspace(&name)?;
            }
            Op::Get { view, keyspace, key } => {
                let Some(snapshot) = self.view(view)? else { return Ok(Answer::Value(None)) };
                let place = Place { branch: "main".to_owned(), keyspace: *keyspace };
                let found = match snapshot.get(&self.keyspace(&place)?, key) {
                    // It was made later.
                    Err(e) if matches!(e.kind(), ErrorKind::Invalid | ErrorKind::NotFound) => None,
                    found => found?,
                };
                return Ok(Answer::Value(found.map(|value| value.to_vec())));
            }
            Op::Scan { view, keyspace, bounds, way } => {
                let Some(snapshot) = self.view(view)? else { return Ok(Answer::Pairs(Vec::new())) };
                let place = Place { branch: "main".to_owned(), keyspace: *keyspace };
                return match scan(&snapshot, &self.keyspace(&place)?, bounds, *way) {
                    Err(e) if matches!(e.kind(), ErrorKind::Invalid | ErrorKind::NotFound) => {
                        Ok(Answer::Pairs(Vec::new()))
                    }
                    pairs => Ok(Answer::Pairs(pairs?)),
                };
            }
            Op::Pin(branch) => self.pinned = Some(self.store().open_clone(branch)?.snapshot()?),
            Op::Unpin => self.pinned = None,
            Op::Checkpoint { name, branch } => drop(self.store().open_clone(branch)?.checkpoint(name)?),
            Op::DropCheckpoint(name) => self.store().drop_checkpoint(name)?,
            Op::Clone { name, checkpoint } => drop(self.store().create_clone(name, checkpoint)?),
            Op::DropClone(name) => self.store().drop_clone(name)?,
            Op::Compact(place) => {
                let keyspace = self.keyspace(place)?;
                keyspace.store().compact::<&str>(&keyspace, ..)?;
            }
            Op::Close | Op::Kill => {
                self.pinned = None;
                let store = self.store.take().expect("it is open");
                if matches!(op, Op::Close) {
                    store.close()?;
                }
                drop(store);
                if self.tuning.backend.is_none() && matches!(op, Op::Kill) {
                    self.media.crash(self.done as u64);
                }
                self.open();
            }
        }
        Ok(Answer::Done)
    }
}

fn scan(snapshot: &Snapshot, keyspace: &Keyspace, bounds: &Bounds, way: Way) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let pair = |entry: Entry| (entry.key.to_vec(), entry.value.to_vec());
    let mut scan = snapshot.range(keyspace, bounds.clone());
    match way {
        Way::Forward => scan.map(|entry| entry.map(pair)).collect(),
        Way::Back => {
            let mut pairs = scan.rev().map(|entry| entry.map(pair)).collect::<Result<Vec<_>>>()?;
            pairs.reverse();
            Ok(pairs)
        }
        Way::Ends => {
            let (mut front, mut back) = (Vec::new(), Vec::new());
            loop {
                let (first, last) = (scan.next().transpose()?, scan.next_back().transpose()?);
                let over = last.is_none();
                front.extend(first.map(pair));
                back.extend(last.map(pair));
                if over {
                    front.extend(back.into_iter().rev());
                    return Ok(front);
                }
            }
        }
        Way::Visit => {
            let mut pairs = Vec::new();
            scan.visit(|key, value| {
                pairs.push((key.to_vec(), value.to_vec()));
                ControlFlow::Continue(())
            })?;
            Ok(pairs)
        }
    }
}

impl Subject for Ours {
    fn answer(&mut self, op: &Op) -> Answer {
        self.done += 1;
        if self.done.is_multiple_of(self.tuning.compact_every) {
            for keyspace in 0..KEYSPACES {
                let place = Place { branch: "main".to_owned(), keyspace };
                self.run(&Op::Compact(place)).expect("it ends");
            }
        }
        self.run(op).unwrap_or_else(|error| Answer::Refused(error.kind()))
    }
}

/// redb: a table for each keyspace of a branch or checkpoint, and one that says which of those there are.
struct Redb {
    path: PathBuf,
    database: Option<Database>,
    pinned: Option<(ReadTransaction, String)>,
    /// How often each keyspace was dropped.
    dropped: BTreeMap<u64, u64>,
}

const PLACES: TableDefinition<'_, &str, ()> = TableDefinition::new("places");

type Table<'a> = TableDefinition<'a, &'static [u8], &'static [u8]>;

impl Redb {
    fn new(folder: &Path) -> Self {
        let path = folder.join("redb");
        let database = Database::create(&path).expect("it is made");
        let made = database.begin_write().expect("nobody else writes");
        made.open_table(PLACES).expect("made").insert("main", ()).expect("written");
        made.commit().expect("durable");
        Self { path, database: Some(database), pinned: None, dropped: BTreeMap::new() }
    }

    fn table(&self, place: &str, keyspace: u64) -> String {
        format!("{place}/{keyspace}/{}", self.dropped.get(&keyspace).unwrap_or(&0))
    }

    fn database(&self) -> &Database {
        self.database.as_ref().expect("it is open")
    }

    fn exists(&self, place: &str) -> bool {
        let read = self.database().begin_read().expect("readable");
        read.open_table(PLACES).expect("made").get(place).expect("readable").is_some()
    }

    /// Writes if the branch is there.
    fn write(&self, branch: &str, write: impl FnOnce(&WriteTransaction) -> Answer) -> Answer {
        if !self.exists(branch) {
            return Answer::Refused(ErrorKind::NotFound);
        }
        let mut transaction = self.database().begin_write().expect("nobody else writes");
        transaction.set_durability(redb::Durability::None).expect("no savepoint is open");
        let answer = write(&transaction);
        match answer {
            Answer::Done => transaction.commit().expect("written"),
            _ => transaction.abort().expect("nothing is written"),
        }
        answer
    }

    fn mutate(&self, transaction: &WriteTransaction, table: &str, mutations: &[Mutation]) {
        let mut table = transaction.open_table(Table::new(table)).expect("made");
        for mutation in mutations {
            match mutation {
                Mutation::Put(key, value) => drop(table.insert(key.as_bytes(), value.as_slice()).expect("written")),
                Mutation::Remove(key) => drop(table.remove(key.as_bytes()).expect("written")),
                Mutation::RemoveRange(from, to) => {
                    table.retain_in::<&[u8], _>(from.as_bytes()..to.as_bytes(), |_, _| false).expect("written");
                }
                Mutation::Append(key, operand) => {
                    let value = table.get(key.as_bytes()).expect("readable").map(|value| value.value().to_vec());
                    let value = [value.unwrap_or_default(), operand.clone()].concat();
                    table.insert(key.as_bytes(), value.as_slice()).expect("written");
                }
            }
        }
    }

    /// Makes `to` a copy of `from`.
    fn copy(&self, transaction: &WriteTransaction, from: &str, to: &str) {
        for keyspace in 0..KEYSPACES {
            let source = transaction.open_table(Table::new(&self.table(from, keyspace))).expect("made");
            let target = self.table(to, keyspace);
            let mut target = transaction.open_table(Table::new(&target)).expect("made");
            for pair in source.iter().expect("readable") {
                let (key, value) = pair.expect("readable");
                target.insert(key.value(), value.value()).expect("written");
            }
        }
        transaction.open_table(PLACES).expect("made").insert(to, ()).expect("written");
    }

    fn remove(&self, place: &str) -> Answer {
        self.write(place, |transaction| {
            for keyspace in 0..KEYSPACES {
                transaction.delete_table(Table::new(&self.table(place, keyspace))).expect("no table is open");
            }
            transaction.open_table(PLACES).expect("made").remove(place).expect("written");
            Answer::Done
        })
    }

    /// The pairs of a keyspace of a view; none if there is no such view.
    fn pairs(&self, view: &View, keyspace: u64, bounds: &Bounds) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
        let now;
        let (read, place) = match view {
            View::Pinned => match &self.pinned {
                Some((read, place)) => (read, place),
                None => return Some(Vec::new()),
            },
            View::Branch(place) | View::Checkpoint(place) => {
                if !self.exists(place) {
                    return None;
                }
                now = self.database().begin_read().expect("readable");
                (&now, place)
            }
        };
        // It was made later, and is empty.
        let Ok(table) = read.open_table(Table::new(&self.table(place, keyspace))) else { return Some(Vec::new()) };
        let bounds = (bounds.0.as_ref().map(Vec::as_slice), bounds.1.as_ref().map(Vec::as_slice));
        let pairs = table.range::<&[u8]>(bounds).expect("readable");
        Some(pairs.map(|pair| pair.map(|(k, v)| (k.value().to_vec(), v.value().to_vec())).expect("readable")).collect())
    }
}

impl Subject for Redb {
    fn answer(&mut self, op: &Op) -> Answer {
        let missing = Answer::Refused(ErrorKind::NotFound);
        match op {
            Op::Write { place, mutations } => self.write(&place.branch, |transaction| {
                self.mutate(transaction, &self.table(&place.branch, place.keyspace), mutations);
                Answer::Done
            }),
            Op::WriteIf { place, key, value, mutations } => self.write(&place.branch, |transaction| {
                let table = self.table(&place.branch, place.keyspace);
                let holds = {
                    let table = transaction.open_table(Table::new(&table)).expect("made");
                    let found = table.get(key.as_bytes()).expect("readable");
                    found.map(|found| found.value().to_vec()) == *value
                };
                if !holds {
                    return Answer::Refused(ErrorKind::Conflict);
                }
                self.mutate(transaction, &table, mutations);
                Answer::Done
            }),
            Op::Transact { place, read, other, value, mutations } => {
                let touched = |mutation: &Mutation| match mutation {
                    Mutation::Put(key, _) | Mutation::Remove(key) | Mutation::Append(key, _) => key == other,
                    // It is no read.
                    Mutation::RemoveRange(..) => false,
                };
                // An operand reads what it is merged into, unless that is the transaction's own.
                let first = mutations.iter().find(|mutation| match mutation {
                    Mutation::RemoveRange(from, to) => from <= other && other < to,
                    mutation => touched(mutation),
                });
                let merged = matches!(first, Some(Mutation::Append(..)));
                // A range that is removed takes the mutations before it with it.
                let mut left: Vec<&Mutation> = Vec::new();
                for mutation in mutations {
                    if let Mutation::RemoveRange(from, to) = mutation {
                        left.retain(|before| match before {
                            Mutation::Put(key, _) | Mutation::Remove(key) | Mutation::Append(key, _) => {
                                !(from <= key && key < to)
                            }
                            Mutation::RemoveRange(..) => true,
                        });
                    }
                    left.push(mutation);
                }
                let conflict = read == other || merged || left.into_iter().any(touched);
                self.write(&place.branch, |transaction| {
                    let table = self.table(&place.branch, place.keyspace);
                    self.mutate(transaction, &table, &[Mutation::Put(other.clone(), value.clone())]);
                    if !conflict {
                        self.mutate(transaction, &table, mutations);
                    }
                    Answer::Done
                });
                match (self.exists(&place.branch), conflict) {
                    (false, _) => missing,
                    (true, true) => Answer::Refused(ErrorKind::Conflict),
                    (true, false) => Answer::Done,
                }
            }
            Op::DropKeyspace(keyspace) => {
                *self.dropped.entry(*keyspace).or_default() += 1;
                Answer::Done
            }
            Op::Get { view, keyspace, key } => {
                let key = key.clone().into_bytes();
                match self.pairs(view, *keyspace, &(Bound::Included(key.clone()), Bound::Included(key))) {
                    Some(mut pairs) => Answer::Value(pairs.pop().map(|(_, value)| value)),
                    None => missing,
                }
            }
            Op::Scan { view, keyspace, bounds, .. } => {
                self.pairs(view, *keyspace, bounds).map_or(missing, Answer::Pairs)
            }
            Op::Pin(branch) => {
                if !self.exists(branch) {
                    return missing;
                }
                self.pinned = Some((self.database().begin_read().expect("readable"), branch.clone()));
                Answer::Done
            }
            Op::Unpin => {
                self.pinned = None;
                Answer::Done
            }
            Op::Checkpoint { name, branch } | Op::Clone { name, checkpoint: branch } => {
                // What is looked at first is part of the answer.
                let is_clone = matches!(op, Op::Clone { .. });
                if !(self.exists(branch) || is_clone && self.exists(name)) {
                    return missing;
                }
                if self.exists(name) {
                    return Answer::Refused(ErrorKind::Invalid);
                }
                self.write(branch, |transaction| {
                    self.copy(transaction, branch, name);
                    Answer::Done
                })
            }
            Op::DropCheckpoint(name) | Op::DropClone(name) => self.remove(name),
            Op::Compact(place) => {
                if self.exists(&place.branch) {
                    Answer::Done
                } else {
                    missing
                }
            }
            Op::Close | Op::Kill => {
                self.pinned = None;
                self.database().begin_write().expect("nobody else writes").commit().expect("durable");
                drop(self.database.take());
                self.database = Some(Database::open(&self.path).expect("it opens"));
                Answer::Done
            }
        }
    }
}

fn seeds(short: u64) -> std::ops::Range<u64> {
    let given = std::env::var("MAINSTAY_ANSWERS_SEEDS").ok().and_then(|count| count.parse().ok());
    0..given.unwrap_or(short)
}

fn check(seed: u64, one: &mut dyn Subject, other: &mut dyn Subject, what: &str) {
    for (at, op) in operations(seed).iter().enumerate() {
        let (answer, expect) = (one.answer(op), other.answer(op));
        assert_eq!(answer, expect, "seed {seed}, {what}, operation {at}: {op:?}");
    }
}

#[test]
fn a_store_answers_as_redb_does() {
    for seed in seeds(2) {
        let folder = tempfile::tempdir().expect("a folder");
        let backend = if seed % 2 == 0 { BackendChoice::Auto } else { BackendChoice::Threads };
        let tuning = Tuning { backend: Some(backend), ..Tuning::busy("on files") };
        let (mut ours, mut redb) = (Ours::new(tuning, folder.path()), Redb::new(folder.path()));
        check(seed, &mut ours, &mut redb, "ours and redb");
    }
}

#[test]
fn no_setting_changes_an_answer() {
    for seed in seeds(1) {
        for tuning in Tuning::all() {
            let folder = tempfile::tempdir().expect("a folder");
            let name = tuning.name;
            let mut plain = Ours::new(Tuning::plain(), folder.path());
            check(1000 + seed, &mut Ours::new(tuning, folder.path()), &mut plain, name);
        }
    }
}
