//! What a store is opened with.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_engine::{
    Engine, EngineSettings, GroupSettings, MergeOperator, MergeOperators, OwnerRecord, StateMachine, TableCompression,
};
use mainstay_io::{BackendChoice, Environment, Media, MediaOptions, Target};

use crate::{Result, Store};

/// Bytes of the log ring of a volume that is formatted by opening it.
pub const WAL_BYTES_DEFAULT: u64 = 64 << 20;
/// Bytes of the memory budget unless set.
pub const MEMORY_BYTES_DEFAULT: u64 = 256 << 20;

/// Settings and parts of a store; [`Store::builder`] makes one. Every setting has a default that serves.
#[derive(Clone)]
pub struct StoreBuilder {
    memory_bytes: u64,
    wal_bytes: u64,
    wal_in_flight_max: usize,
    scrub_bytes_per_second: u64,
    background_tasks: usize,
    memtable_bytes: u64,
    table_bytes: u64,
    compression: TableCompression,
    backend: BackendChoice,
    pub(crate) format: bool,
    state_machine: Option<Arc<dyn StateMachine>>,
    merge_operators: MergeOperators,
    environment: Option<Environment>,
}

impl Default for StoreBuilder {
    fn default() -> Self {
        Self {
            memory_bytes: MEMORY_BYTES_DEFAULT,
            wal_bytes: WAL_BYTES_DEFAULT,
            wal_in_flight_max: 3,
            scrub_bytes_per_second: mainstay_engine::SCRUB_BYTES_PER_SECOND,
            background_tasks: 1,
            memtable_bytes: 16 << 20,
            table_bytes: 8 << 20,
            compression: TableCompression::ByLevel,
            backend: BackendChoice::Auto,
            format: true,
            state_machine: None,
            merge_operators: MergeOperators::default(),
            environment: None,
        }
    }
}

impl StoreBuilder {
    /// Bytes for memtables, block cache, filters and buffers together. Default 256 MiB, at least 16 MiB. Larger: more
    /// reads from memory. A fifth of it is left to what an allocator keeps beyond what it was asked for; from 256 MiB on
    /// that covered code and stacks of a store alone too, below they come on top: some 25 MiB. May differ between replicas; takes effect at open.
    pub fn memory_bytes(mut self, bytes: u64) -> Self {
        self.memory_bytes = bytes;
        self
    }

    /// Bytes of the log ring, fixed when the volume is formatted. Default 64 MiB. Larger: fewer, larger flushes and a
    /// longer replay after a crash.
    pub fn wal_bytes(mut self, bytes: u64) -> Self {
        self.wal_bytes = bytes;
        self
    }

    /// Batches of the log in flight, 1 to 8. Default 3.
    pub fn wal_in_flight_max(mut self, count: usize) -> Self {
        self.wal_in_flight_max = count;
        self
    }

    /// Bytes a second that the scrubber reads at most, looking for damage; 0 for no scrubber. More finds rot earlier and
    /// takes more of the disk. Default 2 MiB.
    pub fn scrub_bytes_per_second(mut self, bytes: u64) -> Self {
        self.scrub_bytes_per_second = bytes;
        self
    }

    /// Tasks for flush and compaction. Default 1.
    pub fn background_tasks(mut self, count: usize) -> Self {
        self.background_tasks = count;
        self
    }

    /// Bytes applied between two flushes. Default 16 MiB. Equal on all replicas: it decides where tables are cut.
    pub fn memtable_bytes(mut self, bytes: u64) -> Self {
        self.memtable_bytes = bytes;
        self
    }

    /// Bytes at which a table is cut. Default 8 MiB. Equal on all replicas.
    pub fn table_bytes(mut self, bytes: u64) -> Self {
        self.table_bytes = bytes;
        self
    }

    /// How tables are compressed. Default [`TableCompression::ByLevel`]: the fewest bytes. `Lz4` takes less of the processor in
    /// compactions and in reads that no cache answers, `None` the least. Equal on all replicas, and fixed when the store is
    /// made: one that exists keeps what it was made with.
    pub fn compression(mut self, compression: TableCompression) -> Self {
        self.compression = compression;
        self
    }

    /// Which disk interface serves the volume. Default: io_uring where it works, else threads.
    pub fn backend(mut self, backend: BackendChoice) -> Self {
        self.backend = backend;
        self
    }

    /// Whether opening lays out a volume where nothing is yet. Default true; a target that holds data is never touched.
    pub fn format_if_blank(mut self, format: bool) -> Self {
        self.format = format;
        self
    }

    /// Answers the commands given to [`Store::execute`].
    pub fn state_machine(mut self, state_machine: Arc<dyn StateMachine>) -> Self {
        self.state_machine = Some(state_machine);
        self
    }

    /// A merge operator that keyspaces have or may be given ([`Store::keyspace_with_operator`]), beside those of this crate
    /// ([`crate::OperatorId`]). Equal on all replicas, and needed for as long as a keyspace has it: without it the store does not open, and
    /// an error names it. A replica without it leaves service when a keyspace is given it; it has lost nothing, and goes on when it is started
    /// with it. So all replicas are started with a new operator before a keyspace is given it.
    ///
    /// # Errors
    /// `Invalid` for a name of 0 or more than 255 bytes, or one that begins with `mainstay.`.
    pub fn merge_operator(mut self, operator: Arc<dyn MergeOperator>) -> Result<Self> {
        self.merge_operators.add(operator)?;
        Ok(self)
    }

    /// Time, randomness and threads from elsewhere, for instance from a simulation.
    pub fn environment(mut self, environment: Environment) -> Self {
        self.environment = Some(environment);
        self
    }

    /// Opens the store at `path`: a directory (made if absent) or a block device.
    ///
    /// # Errors
    /// `Locked` (another process has it open), `Foreign` (not a volume, a newer format, or a replica of a cluster),
    /// `Corrupt`, `Invalid` (too small, read-only, misaligned), `Io`.
    pub fn open(self, path: impl AsRef<Path>) -> Result<Store> {
        mainstay_io::block_on(self.open_async(path))
    }

    /// As [`StoreBuilder::open`], without blocking the thread.
    ///
    /// # Errors
    /// As [`StoreBuilder::open`].
    pub async fn open_async(self, path: impl AsRef<Path>) -> Result<Store> {
        self.open_target(target_of(path.as_ref())).await
    }

    /// As [`StoreBuilder::open_async`], for a target named as what it is, for instance a file that stands for a device.
    ///
    /// # Errors
    /// As [`StoreBuilder::open`].
    pub async fn open_target(self, target: Target) -> Result<Store> {
        let media = self.media(&target)?;
        Store::open_media(self, media).await
    }

    /// As [`StoreBuilder::open_async`], on media of one's own, for instance of a simulation.
    ///
    /// # Errors
    /// As [`StoreBuilder::open`].
    pub async fn open_media(self, media: Arc<dyn Media>) -> Result<Store> {
        Store::open_media(self, media).await
    }

    /// Lays out a volume on a blank target and makes it durable, without opening it. With `force` also over data.
    ///
    /// # Errors
    /// `Invalid` when the target holds data or is too small, `Locked`, `Io`.
    pub async fn format(self, target: Target, force: bool) -> Result<()> {
        let media = mainstay_io::create_media(&target, &MediaOptions { backend: self.backend })?;
        Ok(Engine::format(media, &self.environment_or_system(), self.wal_bytes, force).await?)
    }

    pub(crate) fn environment_or_system(&self) -> Environment {
        self.environment.clone().unwrap_or_else(Environment::system)
    }

    pub(crate) fn media(&self, target: &Target) -> Result<Arc<dyn Media>> {
        let options = MediaOptions { backend: self.backend };
        let media = match self.format {
            true => mainstay_io::create_media(target, &options),
            false => mainstay_io::open_media(target, &options),
        };
        Ok(media?)
    }

    /// Formats if blank, opens, and gives what the owner of the log wrote before.
    pub(crate) async fn open_engine(
        &self,
        media: Arc<dyn Media>,
        environment: Environment,
        log_holes: bool,
    ) -> Result<(Engine, Vec<OwnerRecord>)> {
        if self.format && media.is_blank()? {
            Engine::format(media.clone(), &environment, self.wal_bytes, false).await?;
        }
        let settings = EngineSettings {
            memory_bytes: self.memory_bytes,
            background_tasks: self.background_tasks,
            wal_in_flight_max: self.wal_in_flight_max,
            scrub_bytes_per_second: self.scrub_bytes_per_second,
            scrub_pause: mainstay_engine::SCRUB_PAUSE,
            log_holes,
        };
        let mut found = Vec::new();
        let engine = Engine::open(media, environment, settings, &mut |record| {
            found.push(record);
            Ok(())
        })
        .await?;
        Ok((engine, found))
    }

    pub(crate) fn group_settings(&self) -> GroupSettings {
        GroupSettings {
            memtable_bytes: self.memtable_bytes,
            table_bytes: self.table_bytes,
            base_level_bytes: 8 * self.table_bytes,
            l0_compaction_runs: 4,
            compression: self.compression,
            state_machine: self.state_machine.clone(),
            merge_operators: self.merge_operators.clone(),
        }
    }
}

/// What lies at `path`: a block device, else a directory.
pub fn target_of(path: &Path) -> Target {
    use std::os::unix::fs::FileTypeExt;
    let path: PathBuf = path.into();
    match std::fs::metadata(&path) {
        Ok(found) if found.file_type().is_block_device() => Target::Device(path),
        _ => Target::Directory(path),
    }
}
