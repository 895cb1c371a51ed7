//! Settings of `mainstay serve`: flags over `MAINSTAY_*` environment over a TOML file over defaults.
//!
//! # Place
//! Read once at start into the checked [`ServeSettings`]; nothing else reads the environment.
//!
//! # Invariants
//! 1. One name a setting: the flag `--listen-peer` is `MAINSTAY_LISTEN_PEER` and `listen-peer` in the file.
//! 2. What is not a setting is refused by its name, in the file and in the environment: a typo is not a default.
//! 3. Without TLS nothing listens beyond loopback unless `insecure-listen-anywhere` says so.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use mainstay::{BackendChoice, SiteLagBound, TableCompression};
use serde::Deserialize;

use crate::cli::Failure;
use crate::limits;
use crate::memory::{MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, memory_bytes_default, read_file};
use crate::units::{ByteSize, Span};

/// Most connections, requests and streams that a limit may allow.
const COUNT_MAX: u64 = 1 << 20;

/// The file of settings, and the switch that no file may set.
#[derive(Args, Clone, Debug, Default)]
pub struct ServeArgs {
    /// TOML file with settings named as the long flags, without the dashes in front
    #[arg(long, env = "MAINSTAY_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The settings.
    #[command(flatten)]
    pub settings: Settings,
}

/// Every setting, unset unless given. One type for flags, environment and file, so that they cannot differ.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Settings {
    /// Name of this process, unique in the cluster; on Kubernetes that of the pod
    #[arg(long, env = "MAINSTAY_NAME", help_heading = "Identity")]
    pub name: Option<String>,

    /// Where the volume lies: a directory, or a block device. A blank one is laid out; one that holds anything else is refused
    #[arg(long, env = "MAINSTAY_DATA", value_name = "DIR|DEVICE", help_heading = "Identity")]
    pub data: Option<PathBuf>,

    /// All members at birth or others to find the cluster by, with the port they listen on for peers; own name allowed
    #[arg(long, env = "MAINSTAY_PEERS", value_name = "NAME=HOST:PORT,...", help_heading = "Identity")]
    pub peers: Option<String>,

    /// Client port: the etcd v3 API and mainstay.v1.Store over gRPC; `none` opens no port [default: 127.0.0.1:2379]
    #[arg(long, env = "MAINSTAY_LISTEN", value_name = "HOST:PORT", help_heading = "Ports")]
    pub listen: Option<String>,

    /// Peer port [default: this process's own entry in --peers, else 127.0.0.1:2380]
    #[arg(long, env = "MAINSTAY_LISTEN_PEER", value_name = "HOST:PORT", help_heading = "Ports")]
    pub listen_peer: Option<String>,

    /// Admin port: /livez, /readyz, /status over HTTP and mainstay.v1.Admin over gRPC; `none` opens no port
    /// [default: 127.0.0.1:2381]
    #[arg(long, env = "MAINSTAY_LISTEN_ADMIN", value_name = "HOST:PORT", help_heading = "Ports")]
    pub listen_admin: Option<String>,

    /// Metrics port: /metrics as Prometheus text; `none` opens no port [default: 127.0.0.1:2382]
    #[arg(long, env = "MAINSTAY_LISTEN_METRICS", value_name = "HOST:PORT", help_heading = "Ports")]
    pub listen_metrics: Option<String>,

    /// Where this process stands, such as a zone: writes at durability `site:NAME` wait for one member there. Told to the
    /// cluster when the process becomes a member [default: none]
    #[arg(long, env = "MAINSTAY_SITE", value_name = "NAME", help_heading = "Identity")]
    pub site: Option<String>,

    /// Which process shall lead: leadership goes by itself to the voter of the highest priority that is caught up and whose disk is
    /// well. 0 to 255. Told to the cluster when the process becomes a member [default: 0]
    #[arg(long, env = "MAINSTAY_PRIORITY", value_name = "NUMBER", help_heading = "Identity")]
    pub priority: Option<u8>,

    /// This process votes and keeps the log, and holds no data: a witness, for a third place that is to cost little. It answers no
    /// reads. Fixed when the process becomes a member
    #[arg(long, env = "MAINSTAY_WITNESS", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL", help_heading = "Identity")]
    pub witness: Option<bool>,

    /// How far sites may lag, the same on all members: bytes of the log that a site may lack and how long. Beyond that it is told, and
    /// with `:wait` writes wait until it is back [default: none]
    #[arg(long, env = "MAINSTAY_SITE_LAG_MAX", value_name = "SITE=SIZE/TIME[:wait],...", help_heading = "Consensus")]
    pub site_lag_max: Option<String>,

    /// Where clients reach this process [default: --listen]
    #[arg(long, env = "MAINSTAY_ADVERTISE", value_name = "HOST:PORT", help_heading = "Ports")]
    pub advertise: Option<String>,

    /// Where peers reach this process [default: own entry in --peers, else --listen-peer]
    #[arg(long, env = "MAINSTAY_ADVERTISE_PEER", value_name = "HOST:PORT", help_heading = "Ports")]
    pub advertise_peer: Option<String>,

    /// Listen on addresses other than loopback although there is no TLS yet: everybody who reaches a port may read and
    /// write everything
    #[arg(long, env = "MAINSTAY_INSECURE_LISTEN_ANYWHERE", num_args = 0..=1, default_missing_value = "true",
          value_name = "BOOL", help_heading = "Ports")]
    pub insecure_listen_anywhere: Option<bool>,

    /// Budget for memtables, block cache, filters and buffers together [default: half of the
    /// cgroup's limit, followed when that is changed, else 256MiB]
    #[arg(long, env = "MAINSTAY_MEMORY", value_name = "SIZE", help_heading = "Storage")]
    pub memory: Option<ByteSize>,

    /// Size of the log ring; used when the volume is laid out, fixed from then on [default: 64MiB]
    #[arg(long, env = "MAINSTAY_WAL", value_name = "SIZE", help_heading = "Storage")]
    pub wal: Option<ByteSize>,

    /// Bytes applied between two flushes; equal on all replicas [default: 16MiB]
    #[arg(long, env = "MAINSTAY_MEMTABLE", value_name = "SIZE", help_heading = "Storage")]
    pub memtable: Option<ByteSize>,

    /// How tables are compressed; equal on all replicas, fixed when the cluster is born [default: by-level]
    #[arg(long, env = "MAINSTAY_COMPRESSION", value_enum, help_heading = "Storage")]
    pub compression: Option<Compression>,

    /// Tasks for flush and compaction, 1 to 16 [default: 1]
    #[arg(long, env = "MAINSTAY_BACKGROUND_TASKS", value_name = "COUNT", help_heading = "Storage")]
    pub background_tasks: Option<usize>,

    /// Threads that serve clients and peers, 1 to 1024. Beside them there are one for the log, one for other reads and writes of
    /// the disk and those of --background-tasks. Replicas that share a machine do more with fewer [default: a thread for each
    /// processor that the process may use]
    #[arg(long, env = "MAINSTAY_WORKER_THREADS", value_name = "COUNT", help_heading = "Limits")]
    pub worker_threads: Option<usize>,

    /// Bytes of data on the volume from which on puts are refused, while reads, deletes and compactions go on; 1MiB to 1PiB
    /// [default: none, the volume's own size]
    #[arg(long, env = "MAINSTAY_DATA_MAX", value_name = "SIZE", help_heading = "Limits")]
    pub data_max: Option<ByteSize>,

    /// What becomes of a volume that is damaged beyond opening, or of another cluster: the process ends or takes no part, or its files are
    /// moved into the folder `aside` beside them and the process ends, so that the next start joins as a new member [default: keep]
    #[arg(long, env = "MAINSTAY_BAD_VOLUME", value_enum, help_heading = "Storage")]
    pub bad_volume: Option<BadVolume>,

    /// Disk interface [default: auto, io_uring where it works, else threads]
    #[arg(long, env = "MAINSTAY_BACKEND", value_enum, help_heading = "Storage")]
    pub backend: Option<Backend>,

    /// Connections that clients may have at once, 1 to 1048576; one more is told to go. At most 256 fewer than the files that
    /// the process may have open [default: 16384, or what these files allow]
    #[arg(long, env = "MAINSTAY_CONNECTIONS_MAX", value_name = "COUNT", help_heading = "Limits")]
    pub connections_max: Option<u64>,

    /// Requests under way at once over all connections of clients, 1 to 1048576; one more is answered with RESOURCE_EXHAUSTED.
    /// More take more memory in a rush, fewer are refused sooner [default: 8192]
    #[arg(long, env = "MAINSTAY_REQUESTS_MAX", value_name = "COUNT", help_heading = "Limits")]
    pub requests_max: Option<u64>,

    /// Streams open at once over all connections of clients, watches, keep-alives and snapshots, 1 to 1048576; one more is answered
    /// with RESOURCE_EXHAUSTED. They take nothing from --requests-max [default: 16384]
    #[arg(long, env = "MAINSTAY_STREAMS_MAX", value_name = "COUNT", help_heading = "Limits")]
    pub streams_max: Option<u64>,

    /// Memory for the bodies of all requests under way, beside --memory, 4MiB to 1TiB; a request that does not fit is answered with
    /// RESOURCE_EXHAUSTED [default: a quarter of --memory]
    #[arg(long, env = "MAINSTAY_REQUESTS_MEMORY", value_name = "SIZE", help_heading = "Limits")]
    pub requests_memory: Option<ByteSize>,

    /// Interval of heartbeats [default: 100ms]
    #[arg(long, env = "MAINSTAY_HEARTBEAT", value_name = "TIME", help_heading = "Consensus")]
    pub heartbeat: Option<Span>,

    /// Lower bound of the election timeout, at least twice the heartbeat; the upper is twice as long [default: 300ms]
    #[arg(long, env = "MAINSTAY_ELECTION_TIMEOUT", value_name = "TIME", help_heading = "Consensus")]
    pub election_timeout: Option<Span>,

    /// Least severe messages that are logged, as in `info` or `warn,mainstay_server=debug` [default: info]
    #[arg(long, env = "MAINSTAY_LOG_LEVEL", value_name = "FILTER", help_heading = "Logs")]
    pub log_level: Option<String>,

    /// Where messages go [default: stderr]
    #[arg(long, env = "MAINSTAY_LOG_TO", value_enum, help_heading = "Logs")]
    pub log_to: Option<LogTo>,

    /// Form of messages [default: json]
    #[arg(long, env = "MAINSTAY_LOG_FORMAT", value_enum, help_heading = "Logs")]
    pub log_format: Option<LogFormat>,
}

/// What becomes of a volume that cannot serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BadVolume {
    /// It stays, for an operator to look at
    Keep,
    /// Its files are moved aside once, and the process ends
    SetAside,
}

/// Between two heartbeats unless set.
pub(crate) const HEARTBEAT_DEFAULT: Duration = Duration::from_millis(100);

/// Disk interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// io_uring where it works, else threads
    Auto,
    /// io_uring or an error
    Uring,
    /// Threads
    Threads,
}

/// Compression of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// None: the least work, the most bytes
    None,
    /// lz4 at every level
    Lz4,
    /// zstd at the last level, lz4 above it: the fewest bytes
    ByLevel,
}

impl From<Compression> for TableCompression {
    fn from(compression: Compression) -> Self {
        match compression {
            Compression::None => Self::None,
            Compression::Lz4 => Self::Lz4,
            Compression::ByLevel => Self::ByLevel,
        }
    }
}

impl From<Backend> for BackendChoice {
    fn from(backend: Backend) -> Self {
        match backend {
            Backend::Auto => Self::Auto,
            Backend::Uring => Self::Uring,
            Backend::Threads => Self::Threads,
        }
    }
}

/// Where logs go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogTo {
    /// Standard error
    Stderr,
    /// Standard output
    Stdout,
}

/// What a log line looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// One JSON object a line
    Json,
    /// For people
    Text,
}

/// Checked settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeSettings {
    /// Name of this process.
    pub name: String,
    /// Where the volume lies.
    pub data: PathBuf,
    /// Names and peer addresses.
    pub peers: BTreeMap<String, String>,
    /// Where the process stands; empty for nowhere in particular.
    pub site: String,
    /// The voter with the highest one shall lead.
    pub priority: u8,
    /// It votes and holds no data.
    pub witness: bool,
    /// How far sites may lag.
    pub site_lag_bounds: Vec<SiteLagBound>,
    /// Client port.
    pub listen: Option<SocketAddr>,
    /// Peer port.
    pub listen_peer: SocketAddr,
    /// Admin port.
    pub listen_admin: Option<SocketAddr>,
    /// Metrics port.
    pub listen_metrics: Option<SocketAddr>,
    /// Where clients reach this process, if not at the client port.
    pub advertise: Option<String>,
    /// Where peers reach this process, if not at the peer port.
    pub advertise_peer: Option<String>,
    /// Memory budget.
    pub memory_bytes: u64,
    /// Nobody said how much: it follows the limit of the cgroup.
    pub memory_follows: bool,
    /// Log ring at format.
    pub wal_bytes: u64,
    /// Bytes between two rotations.
    pub memtable_bytes: u64,
    /// How tables are compressed.
    pub compression: Compression,
    /// Flush and compaction tasks.
    pub background_tasks: usize,
    /// None: as many as there are processors for the process.
    pub worker_threads: Option<usize>,
    /// What becomes of a volume that cannot serve.
    pub bad_volume: BadVolume,
    /// Disk interface.
    pub backend: Backend,
    /// Connections of clients at once.
    pub connections_max: u64,
    /// Requests under way at once.
    pub requests_max: u64,
    /// Streams open at once.
    pub streams_max: u64,
    /// Bytes of the bodies of all requests under way.
    pub requests_memory_bytes: u64,
    /// Bytes of data from which on puts are refused.
    pub data_bytes_max: Option<u64>,
    /// Heartbeat interval.
    pub heartbeat: Duration,
    /// Lower bound of the election timeout.
    pub election_timeout: Duration,
    /// Log filter.
    pub log_level: String,
    /// Where logs go.
    pub log_to: LogTo,
    /// Form of logs.
    pub log_format: LogFormat,
}

impl ServeArgs {
    /// Reads the file, puts flags and environment over it, checks everything.
    ///
    /// # Errors
    /// A usage failure that names the setting, what is wrong and what to give in its place.
    pub fn resolve(self) -> Result<ServeSettings, Failure> {
        let file = match &self.config {
            Some(path) => {
                let text = std::fs::read_to_string(path).map_err(|e| {
                    Failure::usage(format!("cannot read the settings file: {e} path={}", path.display()))
                })?;
                parse_file(&text, path)?
            }
            None => Settings::default(),
        };
        self.settings.over(file).check()
    }
}

/// Parses a settings file.
fn parse_file(text: &str, path: &Path) -> Result<Settings, Failure> {
    toml::from_str(text)
        .map_err(|e| Failure::usage(format!("settings file {}: {}", path.display(), e.to_string().trim())))
}

macro_rules! first_of {
    ($upper:ident, $lower:ident: $($field:ident),* $(,)?) => {
        Settings { $($field: $upper.$field.or($lower.$field)),* }
    };
}

impl Settings {
    /// These where set, else those of `lower`.
    fn over(self, lower: Self) -> Self {
        first_of!(self, lower: name, data, peers, site, priority, witness, site_lag_max, listen, listen_peer, listen_admin, listen_metrics, advertise,
            advertise_peer, insecure_listen_anywhere, memory, wal, memtable, compression, background_tasks, worker_threads, bad_volume, backend,
            connections_max, requests_max, streams_max, requests_memory, data_max, heartbeat, election_timeout, log_level, log_to, log_format)
    }

    fn check(self) -> Result<ServeSettings, Failure> {
        let name = self.name.ok_or_else(|| missing("name", "a name unique in the cluster"))?;
        if name.is_empty() || name.len() > 255 || name.contains(['=', ',', '/']) || name.contains(char::is_whitespace) {
            return Err(Failure::usage(format!(
                "name is 1 to 255 bytes without '=', ',', '/' and spaces name='{name}'"
            )));
        }
        let site = self.site.unwrap_or_default();
        check_site(&site).map_err(Failure::usage)?;
        let data = self.data.ok_or_else(|| missing("data", "a directory or a block device"))?;
        let peers = parse_peers(self.peers.as_deref().unwrap_or_default())?;
        let own = peers.get(&name).cloned();

        let anywhere = self.insecure_listen_anywhere.unwrap_or(false);
        let port = |setting: &str, given: Option<String>, default: &str| {
            listen_address(setting, given.as_deref().unwrap_or(default), anywhere)
        };
        let listen_peer = match (self.listen_peer, &own) {
            (Some(given), _) => port("listen-peer", Some(given), "")?,
            (None, Some(own)) => port("listen-peer", Some(own.clone()), "")?,
            (None, None) => port("listen-peer", None, "127.0.0.1:2380")?,
        };
        let listen_peer = listen_peer.ok_or_else(|| Failure::usage("listen-peer cannot be none: give HOST:PORT"))?;

        let memory_bytes = self.memory.map_or_else(|| memory_bytes_default(&read_file), |size| size.0);
        let wal_bytes = self.wal.map_or(mainstay::WAL_BYTES_DEFAULT, |size| size.0);
        let memtable_bytes = self.memtable.map_or(16 << 20, |size| size.0);
        let background_tasks = self.background_tasks.unwrap_or(1);
        let connections_possible = limits::connections_possible().min(COUNT_MAX);
        let connections_max = self.connections_max.unwrap_or(connections_possible.min(16_384));
        let requests_max = self.requests_max.unwrap_or(8192);
        let streams_max = self.streams_max.unwrap_or(16_384);
        let requests_memory_bytes = self.requests_memory.map_or(memory_bytes / 4, |size| size.0);
        let heartbeat = self.heartbeat.map_or(HEARTBEAT_DEFAULT, |span| span.0);
        let election_timeout = self.election_timeout.map_or(Duration::from_millis(300), |span| span.0);
        bounds("memory", memory_bytes, MEMORY_BYTES_MIN, MEMORY_BYTES_MAX)?;
        bounds("wal", wal_bytes, 1 << 20, 1 << 40)?;
        bounds("memtable", memtable_bytes, 64 << 10, 1 << 30)?;
        bounds("background-tasks", background_tasks as u64, 1, 16)?;
        self.worker_threads.map_or(Ok(()), |threads| bounds("worker-threads", threads as u64, 1, 1024))?;
        bounds("connections-max", connections_max, 1, connections_possible)?;
        bounds("requests-max", requests_max, 1, COUNT_MAX)?;
        bounds("streams-max", streams_max, 1, COUNT_MAX)?;
        // The largest request of the etcd API always fits, while nothing else is under way.
        bounds("requests-memory", requests_memory_bytes, 4 << 20, 1 << 40)?;
        let data_bytes_max = self.data_max.map(|size| size.0);
        data_bytes_max.map_or(Ok(()), |bytes| bounds("data-max", bytes, 1 << 20, 1 << 50))?;
        if heartbeat < Duration::from_millis(5) || election_timeout < heartbeat * 2 {
            let message = format!(
                "heartbeat is at least 5ms and election-timeout at least twice as long heartbeat={}ms election-timeout={}ms",
                heartbeat.as_millis(),
                election_timeout.as_millis()
            );
            return Err(Failure::usage(message));
        }
        Ok(ServeSettings {
            listen: port("listen", self.listen, "127.0.0.1:2379")?,
            listen_admin: port("listen-admin", self.listen_admin, "127.0.0.1:2381")?,
            listen_metrics: port("listen-metrics", self.listen_metrics, "127.0.0.1:2382")?,
            advertise: self.advertise,
            advertise_peer: self.advertise_peer.or(own),
            listen_peer,
            name,
            data,
            peers,
            site,
            priority: self.priority.unwrap_or(0),
            witness: self.witness.unwrap_or(false),
            site_lag_bounds: parse_site_lags(self.site_lag_max.as_deref().unwrap_or_default())?,
            memory_bytes,
            memory_follows: self.memory.is_none(),
            wal_bytes,
            memtable_bytes,
            compression: self.compression.unwrap_or(Compression::ByLevel),
            background_tasks,
            worker_threads: self.worker_threads,
            bad_volume: self.bad_volume.unwrap_or(BadVolume::Keep),
            backend: self.backend.unwrap_or(Backend::Auto),
            connections_max,
            requests_max,
            streams_max,
            requests_memory_bytes,
            data_bytes_max,
            heartbeat,
            election_timeout,
            log_level: self.log_level.unwrap_or_else(|| "info".into()),
            log_to: self.log_to.unwrap_or(LogTo::Stderr),
            log_format: self.log_format.unwrap_or(LogFormat::Json),
        })
    }
}

fn missing(setting: &str, what: &str) -> Failure {
    let variable = setting.to_uppercase().replace('-', "_");
    Failure::usage(format!(
        "{setting} is not set: give {what} by --{setting}, MAINSTAY_{variable} or the settings file"
    ))
}

fn bounds(setting: &str, value: u64, least: u64, most: u64) -> Result<(), Failure> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(Failure::usage(format!("{setting} is out of range value={value} least={least} most={most}")))
}

/// Whether a text may be the label of a site; else what one is.
pub(crate) fn check_site(site: &str) -> Result<(), String> {
    if site.len() > 255 || site.contains(char::is_whitespace) {
        return Err(format!("site is at most 255 bytes without spaces site='{site}'"));
    }
    Ok(())
}

/// `west=64MiB/10s:wait,east=1GiB/5m`.
fn parse_site_lags(text: &str) -> Result<Vec<SiteLagBound>, Failure> {
    let mut bounds: Vec<SiteLagBound> = Vec::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let refused = |why: &str| {
            Failure::usage(format!(
                "site-lag-max is SITE=SIZE/TIME or SITE=SIZE/TIME:wait, separated by commas: {why} found='{part}'"
            ))
        };
        let (bound, wait) = part.strip_suffix(":wait").map_or((part, false), |bound| (bound, true));
        let (site, most) =
            bound.split_once('=').filter(|(site, _)| !site.is_empty()).ok_or_else(|| refused("no site"))?;
        check_site(site).map_err(|why| refused(&why))?;
        let (bytes, time) = most.split_once('/').ok_or_else(|| refused("no time"))?;
        let ByteSize(bytes) = bytes.parse().map_err(|why: String| refused(&why))?;
        let Span(time) = time.parse().map_err(|why: String| refused(&why))?;
        if bytes == 0 || time < Duration::from_secs(1) {
            return Err(refused("at least 1 byte and 1s"));
        }
        if bounds.iter().any(|bound| bound.site == site) {
            return Err(refused("a site has one bound"));
        }
        bounds.push(SiteLagBound { site: site.into(), bytes, time, wait });
    }
    Ok(bounds)
}

/// `a=host:port,b=host:port`.
fn parse_peers(text: &str) -> Result<BTreeMap<String, String>, Failure> {
    let mut peers = BTreeMap::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let parsed = part.split_once('=').filter(|(name, address)| !name.is_empty() && has_port(address));
        let Some((name, address)) = parsed else {
            return Err(Failure::usage(format!("peers are NAME=HOST:PORT, separated by commas found='{part}'")));
        };
        if peers.insert(name.to_owned(), address.to_owned()).is_some() {
            return Err(Failure::usage(format!("peers name a process twice name={name}")));
        }
    }
    Ok(peers)
}

fn has_port(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

/// The socket to bind, `None` for `none`.
fn listen_address(setting: &str, text: &str, anywhere: bool) -> Result<Option<SocketAddr>, Failure> {
    if text == "none" {
        return Ok(None);
    }
    let resolved = text.to_socket_addrs().ok().and_then(|mut found| found.next());
    let address = resolved
        .ok_or_else(|| Failure::usage(format!("{setting} is HOST:PORT with a host of this machine found='{text}'")))?;
    if !address.ip().is_loopback() && !anywhere {
        return Err(Failure::usage(format!(
            "{setting} would be reachable from other machines and there is no TLS yet: listen on loopback, or allow it with \
             --insecure-listen-anywhere address={address}"
        )));
    }
    Ok(Some(address))
}

/// Refuses variables of the environment that begin as ours and are none: a typo would otherwise be a silent default.
///
/// # Errors
/// A usage failure that names the variable.
pub fn refuse_unknown_environment(
    command: &clap::Command,
    environment: impl Iterator<Item = String>,
) -> Result<(), Failure> {
    let mut known = Vec::new();
    collect_variables(command, &mut known);
    match environment.filter(|name| name.starts_with("MAINSTAY_")).find(|name| !known.contains(name)) {
        Some(name) => {
            Err(Failure::usage(format!("unknown setting in the environment: unset or correct it name={name}")))
        }
        None => Ok(()),
    }
}

fn collect_variables(command: &clap::Command, known: &mut Vec<String>) {
    known.extend(
        command.get_arguments().filter_map(|arg| arg.get_env()).map(|name| name.to_string_lossy().into_owned()),
    );
    for subcommand in command.get_subcommands() {
        collect_variables(subcommand, known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minimal() -> Settings {
        Settings { name: Some("a".into()), data: Some("/tmp/a".into()), ..Settings::default() }
    }

    fn refused(settings: Settings) -> String {
        match settings.check() {
            Ok(settings) => panic!("accepted {settings:?}"),
            Err(failure) => {
                assert_eq!(failure.status(), 2, "a wrong setting is a usage failure");
                failure.to_string()
            }
        }
    }

    #[test]
    fn what_is_above_wins_and_what_is_below_fills() {
        let upper = Settings { heartbeat: Some(Span(Duration::from_millis(50))), ..Settings::default() };
        let lower = parse_file(
            "heartbeat = '75ms'\nwal = '32MiB'\nmemory = 33554432\npriority = 7\nwitness = true\nconnections-max = 9\nworker-threads = 3",
            Path::new("file"),
        )
        .expect("valid");
        let found = upper.over(lower).over(minimal()).check().expect("valid");
        assert_eq!(found.heartbeat, Duration::from_millis(50));
        assert_eq!(found.wal_bytes, 32 << 20);
        assert_eq!(found.memory_bytes, 32 << 20);
        assert_eq!(found.priority, 7);
        assert_eq!(found.worker_threads, Some(3));
        assert_eq!((found.connections_max, found.requests_max, found.streams_max), (9, 8192, 16_384));
        assert_eq!(found.requests_memory_bytes, 8 << 20, "a quarter of the memory");
        assert!(found.witness && !minimal().check().expect("valid").witness);
        assert_eq!(found.name, "a");
        assert_eq!(found.listen, Some("127.0.0.1:2379".parse().expect("an address")));
    }

    #[test]
    fn bounds_of_sites_are_read_and_wrong_ones_are_named() {
        let settings = |text: &str| Settings { site_lag_max: Some(text.into()), ..minimal() };
        let found = settings("west=64MiB/10s:wait, east=1GiB/5m").check().expect("valid").site_lag_bounds;
        let bound = |site: &str, bytes, seconds, wait| SiteLagBound {
            site: site.into(),
            bytes,
            time: Duration::from_secs(seconds),
            wait,
        };
        assert_eq!(found, [bound("west", 64 << 20, 10, true), bound("east", 1 << 30, 300, false)]);
        for wrong in [
            "west",
            "=1MiB/1s",
            "west=1MiB",
            "west=x/1s",
            "west=1MiB/1",
            "west=0/1s",
            "west=1MiB/999ms",
            "w=1/1s,w=2/2s",
        ] {
            let message = refused(settings(wrong));
            assert!(message.contains("site-lag-max") && message.contains("found='"), "{message}");
        }
    }

    #[test]
    fn an_unknown_setting_in_the_file_is_named() {
        let failure = parse_file("hartbeat = '75ms'", Path::new("x.toml")).expect_err("a typo");
        assert!(failure.to_string().contains("hartbeat"), "{failure}");
        assert_eq!(failure.status(), 2);
    }

    #[test]
    fn nothing_listens_beyond_loopback_unless_told_so() {
        for setting in ["listen", "listen-peer", "listen-admin", "listen-metrics"] {
            let with = |anywhere| {
                let mut settings = minimal();
                let address = Some("0.0.0.0:9".to_owned());
                match setting {
                    "listen" => settings.listen = address,
                    "listen-peer" => settings.listen_peer = address,
                    "listen-admin" => settings.listen_admin = address,
                    _ => settings.listen_metrics = address,
                }
                settings.insecure_listen_anywhere = anywhere;
                settings
            };
            let message = refused(with(None));
            assert!(message.contains(setting) && message.contains("--insecure-listen-anywhere"), "{message}");
            assert!(refused(with(Some(false))).contains(setting));
            with(Some(true)).check().expect("allowed in as many words");
        }
    }

    #[test]
    fn ports_can_be_omitted_but_for_that_of_peers() {
        let none = Some("none".to_owned());
        let settings =
            Settings { listen: none.clone(), listen_admin: none.clone(), listen_metrics: none.clone(), ..minimal() };
        let found = settings.check().expect("valid");
        assert_eq!((found.listen, found.listen_admin, found.listen_metrics), (None, None, None));
        assert!(refused(Settings { listen_peer: none, ..minimal() }).contains("listen-peer"));
    }

    #[test]
    fn peers_are_names_and_addresses() {
        let own = "b=127.0.0.1:3,a=127.0.0.1:4";
        let found = Settings { peers: Some(own.into()), ..minimal() }.check().expect("valid");
        assert_eq!(found.listen_peer, "127.0.0.1:4".parse().expect("an address"));
        assert_eq!(found.advertise_peer.as_deref(), Some("127.0.0.1:4"));
        for wrong in ["b", "b=", "b=host", "=host:1", "b=host:99999", "b=h:1,b=h:2"] {
            assert!(refused(Settings { peers: Some(wrong.into()), ..minimal() }).contains("peers"), "{wrong}");
        }
    }

    #[test]
    fn values_out_of_range_are_named_with_their_bounds() {
        let message = refused(Settings { wal: Some(ByteSize(4096)), ..minimal() });
        assert!(message.contains("wal") && message.contains("least=1048576"), "{message}");
        let message = refused(Settings { connections_max: Some(u64::MAX), ..minimal() });
        assert!(message.contains("connections-max") && message.contains("most="), "{message}");
        assert!(refused(Settings { requests_max: Some(0), ..minimal() }).contains("requests-max"));
        assert!(refused(Settings { streams_max: Some(0), ..minimal() }).contains("streams-max"));
        for threads in [0, 1025] {
            assert!(refused(Settings { worker_threads: Some(threads), ..minimal() }).contains("worker-threads"));
        }
        let small = Some(ByteSize((4 << 20) - 1));
        assert!(refused(Settings { requests_memory: small, ..minimal() }).contains("requests-memory"));
        let message = refused(Settings { election_timeout: Some(Span(Duration::from_millis(50))), ..minimal() });
        assert!(message.contains("election-timeout"), "{message}");
        assert!(refused(Settings { name: None, ..minimal() }).contains("MAINSTAY_NAME"));
        assert!(refused(Settings { name: Some("a b".into()), ..minimal() }).contains("name"));
    }

    #[test]
    fn an_unknown_variable_is_named() {
        let command = <crate::cli::Cli as clap::CommandFactory>::command();
        let check = |name: &str| refuse_unknown_environment(&command, [name.to_owned()].into_iter());
        check("MAINSTAY_LISTEN_PEER").expect("a setting");
        check("PATH").expect("not ours");
        let failure = check("MAINSTAY_LISTEN_PEERS").expect_err("a typo");
        assert!(failure.to_string().contains("MAINSTAY_LISTEN_PEERS"), "{failure}");
        assert_eq!(failure.status(), 2);
    }
}
