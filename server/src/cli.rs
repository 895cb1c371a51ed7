//! The command line: what there is to say, and the exit status.
//!
//! # Invariants
//! 1. Exit status 0: done. 2: the call was wrong (flags, settings). 1: anything else.
//! 2. Results go to standard output, everything else to standard error.
//! 3. With `--json` exactly one JSON document goes to standard output.

use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

use crate::settings::{Backend, ServeArgs, check_site};
use crate::units::{ByteSize, Span};
use crate::{bench, client, disk_check, etcd, offline, placed, prestop, recover, serve, settings};

/// Runs and operates replicas of an ordered key-value store that speaks the etcd v3 API.
///
/// A cluster in three steps: start `mainstay serve` on each machine, say `mainstay init --members a,b,c` once to any of
/// them, then use any etcd client. Settings are flags, MAINSTAY_* variables or a TOML file, in this order of precedence.
#[derive(Parser, Debug)]
#[command(name = "mainstay", version, max_term_width = 100, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `mainstay` does.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a replica until SIGTERM, then hand leadership over, drain and close
    Serve(Box<ServeArgs>),
    /// Give birth to a cluster, once: no process ever starts one by itself
    ///
    /// Every member has to run, be reachable and be empty. The same call again finds the cluster made and succeeds.
    Init(InitArgs),
    /// Lay out a volume on a blank directory or block device without starting it
    Format(FormatArgs),
    /// Show one verdict for each layer: disk, log, raft, engine
    Status(StatusArgs),
    /// Change or show who belongs to the cluster
    #[command(subcommand)]
    Member(MemberCommand),
    /// Hand leadership to another voter
    TransferLeader(TransferArgs),
    /// Let the cluster use what this build has new, once every member runs it
    ///
    /// After an upgrade every member may go back to the build before, with its volume, until this is said; not any more from then on. It is
    /// refused while a member is of an earlier build or does not answer. Said again it changes nothing.
    Finalize(FinalizeArgs),
    /// Hold until the others are a quorum without this process, then hand leadership over: a hook before a pod stops
    Prestop(PrestopArgs),
    /// Make, show or drop named, frozen states that share all data
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Make, show or drop writable stores that began as a checkpoint
    #[command(subcommand)]
    Clone(CloneCommand),
    /// Make or show groups: logs with leaders of their own beside the first one, for ranges of placed keyspaces
    #[command(subcommand)]
    Group(GroupCommand),
    /// Show, split, join or move the ranges of a placed keyspace
    #[command(subcommand)]
    Range(RangeCommand),
    /// Make, show, read or write placed keyspaces, whose ranges of keys lie in different groups
    ///
    /// They have nothing in common with the keys of the etcd API.
    #[command(subcommand)]
    Placed(PlacedCommand),
    /// Give the space of what was removed and superseded back now, and wait for that
    ///
    /// Tables are written again on every member; reads and writes go on. Without it the same happens by and by. It waits as long as it
    /// takes, for a day or --timeout. When it is cut off, what was begun goes on: that is 16 keyspaces at a time.
    Compact(CompactArgs),
    /// Measure the etcd API of this server or of etcd, or the library in this process: the YCSB workloads and plain ones
    Bench(Box<BenchArgs>),
    /// Measure whether a disk is fit for a volume: fit, slow or unfit, with figures
    ///
    /// Writes as the log does, through the same code, into files without a name that are gone when it ends. Exit status 0 only when the
    /// disk is fit. On a block device what it holds is lost: see --destroy-device.
    DiskCheck(DiskCheckArgs),
    /// Read a volume offline and check every checksum
    Verify(OfflineArgs),
    /// Show the parts of a volume offline
    #[command(subcommand)]
    Inspect(InspectCommand),
    /// Take up a cluster that has lost its majority for good from one volume, offline: first --plan, then --apply
    ///
    /// All members but the one of --data are given up for good. Say --plan first, with every volume that can still be read; it shows which
    /// entries may be lost. --apply carries out that very plan, named by its digest.
    Recover(RecoverArgs),
}

/// Where commands that talk to the client port connect.
#[derive(Args, Clone, Debug)]
pub struct EndpointsArgs {
    /// Client ports, separated by commas; the first that answers serves
    #[arg(long, env = "MAINSTAY_ENDPOINTS", default_value = "127.0.0.1:2379", value_name = "HOST:PORT,...")]
    pub endpoints: String,
    /// Longest wait for an answer
    #[arg(long, env = "MAINSTAY_TIMEOUT", default_value = "10s", value_name = "TIME")]
    pub timeout: Span,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Where commands that talk to the admin port connect.
#[derive(Args, Clone, Debug)]
pub struct AdminArgs {
    /// Admin ports, separated by commas; the first that answers serves
    #[arg(long, env = "MAINSTAY_ADMIN", default_value = "127.0.0.1:2381", value_name = "HOST:PORT,...")]
    pub admin: String,
    /// Longest wait for an answer
    #[arg(long, env = "MAINSTAY_TIMEOUT", default_value = "10s", value_name = "TIME")]
    pub timeout: Span,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `mainstay init`.
#[derive(Args, Debug)]
pub struct InitArgs {
    /// Names of all first members, as in --peers of the process that is asked
    #[arg(long, value_name = "NAME,...", required = true, value_delimiter = ',', value_parser = member_name)]
    pub members: Vec<String>,
    /// How long to try again while a member cannot be reached
    #[arg(long, default_value = "30s", value_name = "TIME")]
    pub wait: Span,
    /// Where.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// The name of a member, which is easily mistaken for the pair that `--peers` takes.
fn member_name(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((name, _)) => {
            Err(format!("a member is its name alone, here {name}: --peers of `mainstay serve` has the addresses"))
        }
        None => Ok(text.to_owned()),
    }
}

fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=1024) => Ok(count),
        _ => Err("a number from 1 to 1024".into()),
    }
}

fn site(text: &str) -> Result<String, String> {
    check_site(text).map(|()| text.to_owned())
}

/// `mainstay format`.
#[derive(Args, Debug)]
pub struct FormatArgs {
    /// A directory, or a block device
    #[arg(long, env = "MAINSTAY_DATA", value_name = "DIR|DEVICE")]
    pub data: PathBuf,
    /// Size of the log ring
    #[arg(long, env = "MAINSTAY_WAL", default_value = "64MiB", value_name = "SIZE")]
    pub wal: ByteSize,
    /// Disk interface
    #[arg(long, env = "MAINSTAY_BACKEND", value_enum, default_value = "auto")]
    pub backend: Backend,
    /// Lay out the volume although the target holds data, which is lost
    #[arg(long)]
    pub force: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `mainstay status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Where; each of the ports is asked.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `mainstay member`.
#[derive(Subcommand, Debug)]
pub enum MemberCommand {
    /// Add a running, empty process as a learner, and make it a voter once it has caught up
    Add {
        /// Its name
        name: String,
        /// Where it listens for peers
        #[arg(value_name = "HOST:PORT")]
        peer_address: String,
        /// Leave it a learner: it receives and does not vote
        #[arg(long)]
        learner: bool,
        /// Where.
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Remove a member; its volume never takes part again
    Remove {
        /// Its name or its id
        member: String,
        /// Where.
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Make a learner a voter
    Promote {
        /// Its name or its id
        member: String,
        /// Where.
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Change the priority of a member, the label of where it stands, or both
    ///
    /// --priority and --site of `mainstay serve` are told to the cluster when a process becomes a member; from then on this
    /// changes them.
    #[command(group = ArgGroup::new("change").args(["priority", "site"]).required(true).multiple(true))]
    Set {
        /// Its name or its id
        member: String,
        /// 0 to 255: the voter with the highest one that can lead does
        #[arg(long, value_name = "NUMBER")]
        priority: Option<u8>,
        /// A label such as a zone; '' for nowhere in particular
        #[arg(long, value_name = "LABEL", value_parser = site)]
        site: Option<String>,
        /// Where.
        #[command(flatten)]
        admin: AdminArgs,
    },
    /// Show all members
    List {
        /// Where.
        #[command(flatten)]
        admin: AdminArgs,
    },
}

/// `mainstay transfer-leader`.
#[derive(Args, Debug)]
pub struct TransferArgs {
    /// Name or id of the next leader; without it the voter with the highest priority that is caught up
    #[arg(long, value_name = "MEMBER")]
    pub to: Option<String>,
    /// Where.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `mainstay finalize`.
#[derive(Args, Debug)]
pub struct FinalizeArgs {
    /// Where.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `mainstay prestop`.
#[derive(Args, Debug)]
pub struct PrestopArgs {
    /// Longest time to hold
    #[arg(long, default_value = "240s", value_name = "TIME")]
    pub hold: Span,
    /// Time for load balancers to take this process out, after leadership went
    #[arg(long, default_value = "2s", value_name = "TIME")]
    pub drain: Span,
    /// Where.
    #[command(flatten)]
    pub admin: AdminArgs,
}

/// `mainstay checkpoint`.
#[derive(Subcommand, Debug)]
pub enum CheckpointCommand {
    /// Freeze the store, or a clone, under a name
    Create {
        /// Its name
        name: String,
        /// The clone to freeze; without it the store itself
        #[arg(long, value_name = "NAME")]
        clone: Option<String>,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Show all checkpoints
    List {
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Drop a checkpoint; clones made from it stay
    Drop {
        /// Its name
        name: String,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
}

/// `mainstay clone`.
#[derive(Subcommand, Debug)]
pub enum CloneCommand {
    /// Make a writable store from a checkpoint
    Create {
        /// Its name
        name: String,
        /// The checkpoint it begins as
        checkpoint: String,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Show all clones
    List {
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Drop a clone
    Drop {
        /// Its name
        name: String,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
}

/// `mainstay group`.
#[derive(Subcommand, Debug)]
pub enum GroupCommand {
    /// Give birth to a group over the voters of now, or find the one of that name
    ///
    /// It is a log with a leader of its own on the same volumes. There are 128 at most, and they are not dropped.
    Create {
        /// Its name, 1 to 64 bytes
        name: String,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Show all groups as the member that is asked has them; the first one has no name
    List {
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
}

/// How keys and values are written on the command line.
#[derive(Args, Clone, Copy, Debug)]
pub struct BytesArgs {
    /// Keys and values are given and shown in hexadecimal; without it given as they are, and shown with escapes such as \xff
    #[arg(long)]
    pub hex: bool,
}

/// `mainstay range`.
#[derive(Subcommand, Debug)]
pub enum RangeCommand {
    /// Show the ranges of a keyspace and who holds them, as the member that is asked has applied it
    List {
        /// The placed keyspace
        keyspace: String,
        /// How.
        #[command(flatten)]
        bytes: BytesArgs,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Make the keys from KEY on a range of their own; nothing if one begins there
    ///
    /// It stays in the group that it is in, and nothing is copied.
    Split {
        /// The placed keyspace
        keyspace: String,
        /// Where the new range begins, 1 to 4096 bytes
        key: String,
        /// How.
        #[command(flatten)]
        bytes: BytesArgs,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Make the range that begins at KEY one with the range before it, which is in the same group; nothing if none begins there
    Join {
        /// The placed keyspace
        keyspace: String,
        /// Where the range begins
        key: String,
        /// How.
        #[command(flatten)]
        bytes: BytesArgs,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Move the range that KEY is in to another group, and wait until all of it is there
    ///
    /// It is copied in pieces of about 4 MiB. Reads and writes go on; those of the piece on its way wait. The command waits as long as it
    /// takes, for a day or --timeout. When it is cut off the move goes on, and the same command again waits for it.
    Move {
        /// The placed keyspace
        keyspace: String,
        /// A key of the range; '' for the first one
        key: String,
        /// The group; '' for the first one
        #[arg(long, value_name = "GROUP")]
        to: String,
        /// How.
        #[command(flatten)]
        bytes: BytesArgs,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
}

/// `mainstay placed`.
#[derive(Subcommand, Debug)]
pub enum PlacedCommand {
    /// Make a keyspace, one range of the first group, or find it; it is not dropped
    Create {
        /// Its name, 1 to 200 bytes
        keyspace: String,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Show all placed keyspaces
    List {
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Set a key
    Put {
        /// The placed keyspace
        keyspace: String,
        /// The key
        key: String,
        /// The value
        value: String,
        /// When to answer: quorum, all, site:NAME
        #[arg(long, value_name = "LEVEL", default_value = "quorum", value_parser = durability)]
        durability: String,
        /// How.
        #[command(flatten)]
        bytes: BytesArgs,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Show the value of a key; exit status 1 if it is absent
    Get {
        /// The placed keyspace
        keyspace: String,
        /// The key
        key: String,
        /// What the read promises: linearizable, lease, stale:MILLISECONDS, local
        #[arg(long, value_name = "LEVEL", default_value = "linearizable", value_parser = read_level)]
        read_level: String,
        /// How.
        #[command(flatten)]
        bytes: BytesArgs,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Remove a key; nothing if it is absent
    Delete {
        /// The placed keyspace
        keyspace: String,
        /// The key
        key: String,
        /// When to answer: quorum, all, site:NAME
        #[arg(long, value_name = "LEVEL", default_value = "quorum", value_parser = durability)]
        durability: String,
        /// How.
        #[command(flatten)]
        bytes: BytesArgs,
        /// Where.
        #[command(flatten)]
        endpoints: EndpointsArgs,
    },
    /// Show the pairs of a range in order of keys
    ///
    /// Each range of the keyspace is read from a view of its own: over several of them it is no snapshot.
    Scan(ScanArgs),
}

/// `mainstay placed scan`.
#[derive(Args, Debug)]
pub struct ScanArgs {
    /// The placed keyspace
    pub keyspace: String,
    /// The first key
    #[arg(long, value_name = "KEY", default_value = "", hide_default_value = true)]
    pub from: String,
    /// Before this key
    #[arg(long, value_name = "KEY", default_value = "", hide_default_value = true)]
    pub to: String,
    /// Pairs to show at most; what follows is named
    #[arg(long, value_name = "COUNT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub limit: u32,
    /// From the last key to the first
    #[arg(long)]
    pub reverse: bool,
    /// What the reads promise: linearizable, lease, stale:MILLISECONDS, local
    #[arg(long, value_name = "LEVEL", default_value = "linearizable", value_parser = read_level)]
    pub read_level: String,
    /// How.
    #[command(flatten)]
    pub bytes: BytesArgs,
    /// Where.
    #[command(flatten)]
    pub endpoints: EndpointsArgs,
}

fn durability(text: &str) -> Result<String, String> {
    match etcd::parse_durability(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("quorum, all or site:NAME".into()),
    }
}

fn read_level(text: &str) -> Result<String, String> {
    match etcd::parse_read_level(text) {
        Some(_) => Ok(text.to_owned()),
        None => Err("linearizable, lease, stale:MILLISECONDS or local".into()),
    }
}

/// `mainstay compact`.
#[derive(Args, Debug)]
pub struct CompactArgs {
    /// The keyspace; without it all of them
    #[arg(value_name = "KEYSPACE")]
    pub keyspace: Option<String>,
    /// The clone to compact; without it the store itself
    #[arg(long, value_name = "NAME")]
    pub clone: Option<String>,
    /// Where.
    #[command(flatten)]
    pub endpoints: EndpointsArgs,
}

/// What a benchmark does. All but the first three load their records first: see --no-load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Writes of records that may or may not be there, without a load
    Put,
    /// Reads of records that may or may not be there, without a load
    Get,
    /// One write to three reads of the same, without a load
    Mixed,
    /// YCSB A: reads and updates, half and half
    A,
    /// YCSB B: 95 reads to 5 updates
    B,
    /// YCSB C: reads
    C,
    /// YCSB D: 95 reads of what is new to 5 inserts
    D,
    /// YCSB E: 95 scans of 1 to 100 pairs to 5 inserts
    E,
    /// YCSB F: reads and read-modify-writes, half and half
    F,
    /// Inserts of all records, once each
    Fill,
    /// Updates
    Overwrite,
    /// Reads
    Read,
    /// Scans of 1 to 100 pairs
    Scan,
}

/// Which records a benchmark meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Distribution {
    /// All alike
    Uniform,
    /// Few of them most of the time, scattered over all: Zipf's law with the exponent 0.99
    Zipfian,
    /// The newer, the more often, by the same law
    Latest,
}

/// `mainstay bench`.
#[derive(Args, Debug)]
pub struct BenchArgs {
    /// What to do
    #[arg(long, value_enum, default_value = "put")]
    pub workload: Workload,
    /// Requests in flight
    #[arg(long, default_value_t = 64, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub clients: u32,
    /// Connections that they share [default: one for each 16 clients]
    #[arg(long, value_name = "COUNT")]
    pub connections: Option<u32>,
    /// Threads of the client
    #[arg(long, default_value_t = 1, value_name = "COUNT", value_parser = threads)]
    pub threads: usize,
    /// Operations to do, divided over the clients; with --duration whichever ends first
    #[arg(long, value_name = "COUNT")]
    pub ops: Option<u64>,
    /// Time to run [default: 10s without --ops; a fill ends with its records]
    #[arg(long, value_name = "TIME")]
    pub duration: Option<Span>,
    /// Operations a second over all clients; latencies count from when an operation was due. Full speed without it
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    pub rate: Option<u64>,
    /// Bytes of a value
    #[arg(long, default_value = "256", value_name = "SIZE")]
    pub value: ByteSize,
    /// Records to load, and to choose from
    #[arg(long, visible_alias = "records", default_value_t = 100_000, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub keys: u64,
    /// Which records are met, in place of what belongs to the workload
    #[arg(long, value_enum)]
    pub distribution: Option<Distribution>,
    /// The records are there from an earlier run
    #[arg(long)]
    pub no_load: bool,
    /// What all that is drawn follows from: the same seed, the same operations
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    pub seed: u64,
    /// Look at what reads find, and read back all that was written; exit status 1 if anything is wrong or missing
    #[arg(long)]
    pub verify: bool,
    /// Read without a quorum round
    #[arg(long)]
    pub serializable: bool,
    /// Durability of writes: local, quorum, all, site:NAME. Of several each write has one by chance, with figures for each. Sent as
    /// request metadata; etcd ignores it
    #[arg(long, value_name = "LEVEL,...", value_delimiter = ',')]
    pub durability: Vec<String>,
    /// Also write a page with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Measure the library in this process, with a store in this directory, which is made if it is not there
    #[arg(long, value_name = "DIR")]
    pub embedded: Option<PathBuf>,
    /// Memory budget with --embedded
    #[arg(long, default_value = "256MiB", value_name = "SIZE", requires = "embedded")]
    pub memory: ByteSize,
    /// Size of the log ring with --embedded, where the store is made
    #[arg(long, default_value = "64MiB", value_name = "SIZE", requires = "embedded")]
    pub wal: ByteSize,
    /// Where.
    #[command(flatten)]
    pub endpoints: EndpointsArgs,
}

/// `mainstay disk-check`.
#[derive(Args, Clone, Debug)]
pub struct DiskCheckArgs {
    /// A directory on the file system to measure, or a block device
    #[arg(value_name = "DIR|DEVICE")]
    pub path: PathBuf,
    /// How long to measure; half of it is for durable writes one at a time, which decide
    #[arg(long, default_value_t = 10, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub seconds: u32,
    /// Space to use: 64MiB of it, at most half, for the log, the rest for sequential writes and random reads
    #[arg(long, default_value = "256MiB", value_name = "SIZE")]
    pub size: ByteSize,
    /// Disk interface
    #[arg(long, env = "MAINSTAY_BACKEND", value_enum, default_value = "auto")]
    pub backend: Backend,
    /// Write over the block device: what it holds is lost. Refused while it is mounted or held by another process or device, when it
    /// has partitions, and when it holds a volume of Mainstay; nothing else is looked for
    #[arg(long)]
    pub destroy_device: bool,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// Commands on a volume that no process has open.
#[derive(Args, Clone, Debug)]
pub struct OfflineArgs {
    /// A directory, or a block device
    #[arg(long, env = "MAINSTAY_DATA", value_name = "DIR|DEVICE")]
    pub data: PathBuf,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `mainstay recover`.
#[derive(Args, Clone, Debug)]
#[command(group(ArgGroup::new("step").required(true).args(["plan", "apply"])))]
pub struct RecoverArgs {
    /// The volume that goes on: a directory, or a block device
    #[arg(long, env = "MAINSTAY_DATA", value_name = "DIR|DEVICE")]
    pub data: PathBuf,
    /// A volume of another member that can still be read, to compare; may be said several times
    #[arg(long, value_name = "DIR|DEVICE")]
    pub other: Vec<PathBuf>,
    /// Show what would be done and what may be lost; writes nothing
    #[arg(long)]
    pub plan: bool,
    /// Make the volume the only member of its cluster
    #[arg(long, requires = "confirm")]
    pub apply: bool,
    /// The digest of the plan, as --plan showed it for the same volumes
    #[arg(long, value_name = "DIGEST", requires = "apply", conflicts_with = "plan")]
    pub confirm: Option<String>,
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}

/// `mainstay inspect`.
#[derive(Subcommand, Debug)]
pub enum InspectCommand {
    /// Identity, zones and positions of a volume
    Superblock(OfflineArgs),
    /// Records of the log
    Wal(OfflineArgs),
    /// Tables, levels, checkpoints and clones
    Manifest(OfflineArgs),
    /// Blocks and properties of a table
    Table {
        /// Its id, as the manifest shows it
        id: String,
        /// Where.
        #[command(flatten)]
        volume: OfflineArgs,
    },
}

/// A failed command.
#[derive(Debug)]
pub struct Failure {
    status: u8,
    message: String,
}

impl Failure {
    /// The call was wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { status: 2, message: message.into() }
    }

    /// Anything else.
    pub fn other(message: impl Into<String>) -> Self {
        Self { status: 1, message: message.into() }
    }

    /// The exit status.
    pub fn status(&self) -> u8 {
        self.status
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<mainstay::Error> for Failure {
    fn from(error: mainstay::Error) -> Self {
        Self::other(error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::other(error.to_string())
    }
}

/// Prints a document: as JSON, or as text made from it.
pub(crate) fn print(
    json: bool,
    document: &impl serde::Serialize,
    text: impl FnOnce() -> String,
) -> Result<(), Failure> {
    use std::io::Write;
    let text = if json {
        serde_json::to_string_pretty(document).map_err(|e| Failure::other(format!("cannot print the result: {e}")))?
    } else {
        text()
    };
    let mut out = std::io::stdout().lock();
    // Who closed the pipe has seen enough.
    match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// Parses the command line, runs it, and gives the exit status.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let environment = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    let checked = settings::refuse_unknown_environment(&<Cli as clap::CommandFactory>::command(), environment);
    match checked.and_then(|()| run(cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("mainstay: {failure}");
            ExitCode::from(failure.status)
        }
    }
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Serve(args) => serve::run(args.resolve()?),
        Command::Format(args) => offline::format(&args),
        Command::DiskCheck(args) => disk_check::run(&args),
        Command::Verify(args) => offline::verify(&args),
        Command::Inspect(command) => offline::inspect(&command),
        Command::Recover(args) => mainstay_io::block_on(recover::run(args)),
        Command::Init(args) => block_on(client::init(args)),
        Command::Status(args) => block_on(client::status(args)),
        Command::Member(command) => block_on(client::member(command)),
        Command::TransferLeader(args) => block_on(client::transfer_leader(args)),
        Command::Finalize(args) => block_on(client::finalize(args)),
        Command::Prestop(args) => block_on(prestop::run(args)),
        Command::Checkpoint(command) => block_on(client::checkpoint(command)),
        Command::Clone(command) => block_on(client::clone(command)),
        Command::Group(command) => block_on(client::group(command)),
        Command::Range(command) => block_on(placed::range(command)),
        Command::Placed(command) => block_on(placed::placed(command)),
        Command::Compact(args) => block_on(client::compact(args)),
        Command::Bench(args) => bench::run(*args),
    }
}

fn block_on(future: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}
