//! Three processes that answer the etcd API, of Mainstay or of etcd, on loopback: started, asked for their leader, killed,
//! started again.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use mainstay_server::bench::{Report, measure};
use mainstay_server::cli::BenchArgs;
use mainstay_server::proto::etcdserverpb::maintenance_client::MaintenanceClient;
use mainstay_server::proto::etcdserverpb::{StatusRequest, StatusResponse};
use mainstay_server::proto::mainstay::v1::InitRequest;
use mainstay_server::proto::mainstay::v1::admin_client::AdminClient;

/// The result of a step of a program here: any error ends it with its text.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The members of a cluster.
pub const NAMES: [&str; 3] = ["a", "b", "c"];
/// Longest wait for a cluster to be born, to have a leader, or to catch up.
pub const START_MAX: Duration = Duration::from_secs(30);

/// A runtime with one thread a core.
///
/// # Errors
/// The system has no more threads.
pub fn runtime() -> Outcome<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

/// What a program ends with; an error is printed.
pub fn exit_of(outcome: Outcome<()>) -> std::process::ExitCode {
    match outcome {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// Ports of the loopback interface that were free a moment ago.
///
/// # Errors
/// The system has none.
pub fn free_ports(count: usize) -> Outcome<Vec<u16>> {
    let bound: Vec<TcpListener> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
    Ok(bound.iter().map(|l| l.local_addr().map(|a| a.port())).collect::<Result<_, _>>()?)
}

/// Where a process writes what it has to say.
///
/// # Errors
/// The folder cannot be written.
pub fn log_file(dir: &Path, name: &str) -> Outcome<std::fs::File> {
    Ok(std::fs::File::options().create(true).append(true).open(dir.join(format!("{name}.log")))?)
}

/// Ends processes at once.
pub fn end(processes: &mut [Child]) {
    for process in processes {
        let _ = process.kill();
        let _ = process.wait();
    }
}

/// Three processes that answer the etcd API.
pub struct Served {
    name: &'static str,
    dir: PathBuf,
    program: PathBuf,
    arguments: Vec<Vec<String>>,
    processes: Vec<Child>,
    clients: Vec<u16>,
}

impl Served {
    /// Starts three servers of Mainstay and makes a cluster of them. `program` is the server, or another program that begins
    /// as it does when it is told to `serve`; the running one if none is given.
    ///
    /// # Errors
    /// A process does not start, or they do not become a cluster in time.
    pub fn mainstay(dir: &Path, program: Option<&Path>) -> Outcome<Self> {
        let program = match program {
            Some(program) => program.to_owned(),
            None => std::env::current_exe()?,
        };
        let (clients, peers, admin) = (free_ports(3)?, free_ports(3)?, free_ports(3)?);
        let list: Vec<String> = NAMES.iter().zip(&peers).map(|(n, p)| format!("{n}=127.0.0.1:{p}")).collect();
        let mut arguments = Vec::new();
        for (at, name) in NAMES.iter().enumerate() {
            let data = dir.join(name).to_string_lossy().into_owned();
            let listen = format!("127.0.0.1:{}", clients[at]);
            let listen_peer = format!("127.0.0.1:{}", peers[at]);
            let listen_admin = format!("127.0.0.1:{}", admin[at]);
            let words = [
                "serve",
                "--name",
                name,
                "--peers",
                &list.join(","),
                "--data",
                &data,
                "--listen",
                &listen,
                "--listen-peer",
                &listen_peer,
                "--listen-admin",
                &listen_admin,
                "--listen-metrics",
                "none",
            ];
            arguments.push(words.map(str::to_owned).to_vec());
        }
        let served = Self::start("server", dir, program, arguments, clients)?;
        let admin = format!("127.0.0.1:{}", admin[0]);
        runtime()?.block_on(async {
            let deadline = Instant::now() + START_MAX;
            loop {
                let asked = async {
                    let channel = mainstay_server::client::connect(&admin, Duration::from_secs(5))
                        .await
                        .map_err(|e| e.to_string())?;
                    let members = NAMES.map(str::to_owned).into();
                    AdminClient::new(channel).init(InitRequest { members }).await.map_err(|e| e.to_string())?;
                    Outcome::Ok(())
                };
                match asked.await {
                    Ok(()) => return Ok(()),
                    Err(e) if Instant::now() > deadline => return Err(e),
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        })?;
        Ok(served)
    }

    /// Starts three members of the machine's etcd, as it is by default but for a larger quota.
    ///
    /// # Errors
    /// A process does not start.
    pub fn etcd(dir: &Path) -> Outcome<Self> {
        let (clients, peers) = (free_ports(3)?, free_ports(3)?);
        let list: Vec<String> = NAMES.iter().zip(&peers).map(|(n, p)| format!("{n}=http://127.0.0.1:{p}")).collect();
        let mut arguments = Vec::new();
        for (at, name) in NAMES.iter().enumerate() {
            let client = format!("http://127.0.0.1:{}", clients[at]);
            let peer = format!("http://127.0.0.1:{}", peers[at]);
            let data = dir.join(name).to_string_lossy().into_owned();
            let words = [
                "--name",
                name,
                "--initial-cluster",
                &list.join(","),
                "--data-dir",
                &data,
                "--listen-client-urls",
                &client,
                "--advertise-client-urls",
                &client,
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
                "--quota-backend-bytes",
                "8589934592",
            ];
            arguments.push(words.map(str::to_owned).to_vec());
        }
        Self::start("etcd", dir, "etcd".into(), arguments, clients)
    }

    /// Whether the machine has an etcd.
    pub fn has_etcd() -> bool {
        Command::new("etcd").arg("--version").output().is_ok()
    }

    fn start(
        name: &'static str,
        dir: &Path,
        program: PathBuf,
        arguments: Vec<Vec<String>>,
        clients: Vec<u16>,
    ) -> Outcome<Self> {
        std::fs::create_dir_all(dir)?;
        let mut served = Self { name, dir: dir.to_owned(), program, arguments, processes: Vec::new(), clients };
        for at in 0..NAMES.len() {
            let process = served.spawn(at)?;
            served.processes.push(process);
        }
        Ok(served)
    }

    fn spawn(&self, at: usize) -> Outcome<Child> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments[at]).stdin(Stdio::null()).stdout(Stdio::null());
        Ok(command.stderr(log_file(&self.dir, NAMES[at])?).spawn()?)
    }

    /// `server` or `etcd`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The processes, in the order of [`NAMES`].
    pub fn processes(&self) -> std::slice::Iter<'_, Child> {
        self.processes.iter()
    }

    /// The port of the etcd API of a member.
    pub fn client_port(&self, at: usize) -> u16 {
        self.clients[at]
    }

    /// The member that leads, asked in etcd's own protocol of both.
    ///
    /// # Errors
    /// None leads in time.
    pub async fn leader(&self) -> Outcome<usize> {
        let deadline = Instant::now() + START_MAX;
        loop {
            for at in 0..NAMES.len() {
                if let Some(status) = self.status(at).await
                    && status.leader != 0
                    && status.header.is_some_and(|header| header.member_id == status.leader)
                {
                    return Ok(at);
                }
            }
            if Instant::now() > deadline {
                return Err(format!("{} has no leader", self.name).into());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// What `mainstay bench` measures with these arguments at the member that leads.
    ///
    /// # Errors
    /// None leads in time, or the arguments are not those of `mainstay bench`.
    pub async fn load(&self, arguments: &str) -> Outcome<Report> {
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: BenchArgs,
        }
        let endpoint = format!("--endpoints 127.0.0.1:{}", self.client_port(self.leader().await?));
        let words = ["bench"].into_iter().chain(arguments.split(' ')).chain(endpoint.split(' '));
        measure(Line::try_parse_from(words)?.args).await.map_err(|failure| failure.to_string().into())
    }

    async fn status(&self, at: usize) -> Option<StatusResponse> {
        let address = format!("127.0.0.1:{}", self.clients[at]);
        let channel = mainstay_server::client::connect(&address, Duration::from_secs(5)).await.ok()?;
        Some(MaintenanceClient::new(channel).status(StatusRequest {}).await.ok()?.into_inner())
    }

    /// Sends a signal to a member and waits for its end.
    ///
    /// # Errors
    /// It was not running.
    pub fn stop(&mut self, at: usize, signal: Signal) -> Outcome<()> {
        let process = &mut self.processes[at];
        match signal {
            Signal::Kill => process.kill()?,
            Signal::Terminate => {
                let sent = Command::new("kill").args(["-TERM", &process.id().to_string()]).status()?;
                if !sent.success() {
                    return Err("the process could not be sent a signal".into());
                }
            }
        }
        process.wait()?;
        Ok(())
    }

    /// Starts a member that was stopped, and waits until it lacks next to nothing of what the leader has.
    ///
    /// # Errors
    /// It does not start or does not catch up in time.
    pub async fn restart(&mut self, at: usize) -> Outcome<()> {
        self.processes[at] = self.spawn(at)?;
        let deadline = Instant::now() + START_MAX;
        while Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let leader = self.leader().await?;
            if let (Some(status), Some(ahead)) = (self.status(at).await, self.status(leader).await)
                && status.leader != 0
                && status.raft_applied_index + CAUGHT_UP >= ahead.raft_applied_index
            {
                return Ok(());
            }
        }
        Err(format!("{} did not catch up after its restart", NAMES[at]).into())
    }
}

/// A member that lacks at most so many entries has caught up.
const CAUGHT_UP: u64 = 1_000;

/// How a member is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGKILL: as a crash of the process.
    Kill,
    /// SIGTERM: in good order.
    Terminate,
}

impl Drop for Served {
    fn drop(&mut self) {
        end(&mut self.processes);
    }
}
