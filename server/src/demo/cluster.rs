//! Three replicas as processes of this machine, ended by their ids on every way out.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tonic::transport::Channel;

use crate::cli::Failure;
use crate::client;
use crate::proto::mainstay::v1 as pb;
use crate::status::Status;
use pb::admin_client::AdminClient;
use pb::store_client::StoreClient;

const NAMES: [&str; 3] = ["a", "b", "c"];
/// Longest wait for one answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Wait between two looks at a replica.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// Longest wait for a process that was told to stop.
const STOP_MAX: Duration = Duration::from_secs(15);

struct Replica {
    name: &'static str,
    client: String,
    peer: String,
    admin: String,
    metrics: String,
    process: Option<Child>,
}

pub(super) struct Cluster {
    replicas: Vec<Replica>,
    program: PathBuf,
    folder: Option<TempDir>,
    path: PathBuf,
}

/// Ports of the loopback interface that were free a moment ago.
fn free_addresses(count: usize) -> Result<Vec<String>, Failure> {
    let bound: Result<Vec<TcpListener>, _> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect();
    let addresses: Result<Vec<String>, _> = bound?.iter().map(|l| l.local_addr().map(|a| a.to_string())).collect();
    Ok(addresses?)
}

impl Cluster {
    /// Starts the processes; there is no cluster yet.
    pub(super) fn start() -> Result<Self, Failure> {
        let folder = tempfile::Builder::new().prefix("mainstay-demo-").tempdir()?;
        let mut free = free_addresses(4 * NAMES.len())?.into_iter();
        let mut next = || free.next().unwrap_or_default();
        let replicas = NAMES.map(|name| {
            let [client, peer, admin, metrics] = [next(), next(), next(), next()];
            Replica { name, client, peer, admin, metrics, process: None }
        });
        let mut cluster = Self {
            replicas: replicas.into(),
            program: std::env::current_exe()?,
            path: folder.path().to_owned(),
            folder: Some(folder),
        };
        for at in 0..NAMES.len() {
            cluster.restart(at)?;
        }
        Ok(cluster)
    }

    /// Starts the process of a replica on its data.
    pub(super) fn restart(&mut self, at: usize) -> Result<(), Failure> {
        let peers: Vec<String> = self.replicas.iter().map(|r| format!("{}={}", r.name, r.peer)).collect();
        let replica = &mut self.replicas[at];
        let log =
            std::fs::File::options().create(true).append(true).open(self.path.join(format!("{}.log", replica.name)))?;
        let mut command = Command::new(&self.program);
        command.arg("serve").args(["--name", replica.name]).arg("--data").arg(self.path.join(replica.name));
        command.args(["--peers", &peers.join(","), "--listen", &replica.client, "--listen-admin", &replica.admin]);
        command.args(["--listen-peer", &replica.peer, "--listen-metrics", &replica.metrics, "--memory", "128MiB"]);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("MAINSTAY_") {
                command.env_remove(name);
            }
        }
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        replica.process = Some(process.map_err(|e| Failure::other(format!("cannot start a replica: {e}")))?);
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn name(&self, at: usize) -> &'static str {
        self.replicas[at].name
    }

    pub(super) fn client_addresses(&self) -> String {
        self.clients().collect::<Vec<_>>().join(",")
    }

    pub(super) fn clients(&self) -> impl Iterator<Item = &str> {
        self.replicas.iter().map(|replica| replica.client.as_str())
    }

    pub(super) fn len(&self) -> usize {
        self.replicas.len()
    }

    /// Gives birth to the cluster, trying again while processes start.
    pub(super) async fn init(&mut self, patience: Duration) -> Result<(), Failure> {
        let deadline = Instant::now() + patience;
        loop {
            let failure = match self.init_once().await {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            self.refuse_dead()?;
            if Instant::now() > deadline {
                return Err(Failure::other(format!("no cluster was born: {failure}")));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    async fn init_once(&self) -> Result<(), Failure> {
        let mut admin = AdminClient::new(client::connect(&self.replicas[0].admin, ANSWER_MAX).await?);
        let members = NAMES.map(str::to_owned).into();
        admin.init(pb::InitRequest { members }).await.map_err(client::refused)?;
        Ok(())
    }

    /// An error if a process that should run has ended, with the end of its log.
    fn refuse_dead(&mut self) -> Result<(), Failure> {
        for replica in &mut self.replicas {
            let Some(process) = &mut replica.process else { continue };
            if let Some(status) = process.try_wait()? {
                let log = std::fs::read_to_string(self.path.join(format!("{}.log", replica.name))).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(5).collect();
                let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
                return Err(Failure::other(format!("replica {} ended: {status}\n{tail}", replica.name)));
            }
        }
        Ok(())
    }

    async fn status(&self, at: usize) -> Result<Status, Failure> {
        client::status_of(&self.replicas[at].admin, ANSWER_MAX).await
    }

    /// The replica that leads, as itself says.
    pub(super) async fn leader(&mut self, patience: Duration) -> Result<usize, Failure> {
        let deadline = Instant::now() + patience;
        loop {
            for at in 0..self.len() {
                if self.replicas[at].process.is_some()
                    && let Ok(status) = self.status(at).await
                    && status.raft.role == "leader"
                {
                    return Ok(at);
                }
            }
            self.refuse_dead()?;
            if Instant::now() > deadline {
                return Err(Failure::other("nobody leads"));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self, at: usize) -> Result<(), Failure> {
        if let Some(mut process) = self.replicas[at].process.take() {
            process.kill()?;
            process.wait()?;
        }
        Ok(())
    }

    /// Waits until `at` has applied what `leader` had committed when it was asked.
    pub(super) async fn wait_until_caught_up(
        &mut self,
        at: usize,
        leader: usize,
        patience: Duration,
    ) -> Result<Duration, Failure> {
        let start = Instant::now();
        let committed = self.status(leader).await?.raft.committed;
        loop {
            if let Ok(status) = self.status(at).await
                && status.ready
                && status.raft.applied >= committed
            {
                return Ok(start.elapsed());
            }
            self.refuse_dead()?;
            if start.elapsed() > patience {
                return Err(Failure::other(format!("{} did not catch up", self.name(at))));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    pub(super) async fn channel(&self, at: usize) -> Result<Channel, Failure> {
        client::connect(&self.replicas[at].client, Duration::from_secs(30)).await
    }

    pub(super) async fn store_client(&self, at: usize) -> Result<StoreClient<Channel>, Failure> {
        Ok(StoreClient::new(self.channel(at).await?))
    }

    /// Bytes that the data of all replicas take on the disk.
    pub(super) fn disk_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let mut bytes = 0;
        let mut waiting = vec![self.path.clone()];
        while let Some(folder) = waiting.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.metadata() {
                    Ok(metadata) if metadata.is_dir() => waiting.push(entry.path()),
                    Ok(metadata) => bytes += metadata.blocks() * 512,
                    Err(_) => {}
                }
            }
        }
        bytes
    }

    /// Commands for a user who keeps the cluster.
    pub(super) fn how_to_talk(&self) -> String {
        let program = self.program.display();
        let admin: Vec<&str> = self.replicas.iter().map(|replica| replica.admin.as_str()).collect();
        let metrics = &self.replicas[0].metrics;
        let pids: Vec<String> =
            self.replicas.iter().filter_map(|r| r.process.as_ref()).map(|p| p.id().to_string()).collect();
        let (clients, admin, pids) = (self.client_addresses(), admin.join(","), pids.join(" "));
        let path = self.path.display();
        format!(
            "\nThe cluster runs. Talk to it:\n  \
             export ETCDCTL_ENDPOINTS={clients} MAINSTAY_ENDPOINTS={clients} MAINSTAY_ADMIN={admin}\n  \
             etcdctl get --prefix files/ --limit 5\n  \
             {program} status\n  \
             {program} checkpoint list\n  \
             {program} bench --clients 64 --duration 5s\n  \
             curl http://{metrics}/metrics\n\
             Stop it: kill {pids}; its data are in {path}"
        )
    }

    /// Leaves processes and data, and says where the data are.
    pub(super) fn keep(&mut self) -> String {
        for replica in &mut self.replicas {
            // A dropped handle neither ends the process nor waits for it.
            drop(replica.process.take());
        }
        if let Some(folder) = self.folder.take() {
            let _ = folder.keep();
        }
        self.path.display().to_string()
    }

    /// SIGTERM to all, and waits for their exit status.
    pub(super) async fn stop(mut self) -> Result<(), Failure> {
        let mut stopping = Vec::new();
        for replica in &mut self.replicas {
            if let Some(process) = replica.process.take() {
                let pid = rustix::process::Pid::from_child(&process);
                let told = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
                stopping.push((replica.name, process));
                told.map_err(|e| Failure::other(format!("cannot stop {}: {e}", replica.name)))?;
            }
        }
        let deadline = Instant::now() + STOP_MAX;
        let mut complaints = Vec::new();
        for (name, mut process) in stopping {
            loop {
                match process.try_wait()? {
                    Some(status) if status.success() => break,
                    Some(status) => {
                        complaints.push(format!("replica {name} did not close well: {status}"));
                        break;
                    }
                    None if Instant::now() > deadline => {
                        process.kill()?;
                        process.wait()?;
                        complaints.push(format!("replica {name} did not stop in time"));
                        break;
                    }
                    None => tokio::time::sleep(LOOK_INTERVAL).await,
                }
            }
        }
        if complaints.is_empty() { Ok(()) } else { Err(Failure::other(complaints.join("; "))) }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for replica in &mut self.replicas {
            if let Some(mut process) = replica.process.take() {
                let _ = process.kill();
                let _ = process.wait();
            }
        }
    }
}
