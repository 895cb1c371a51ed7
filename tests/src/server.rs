//! Servers as processes.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tonic::transport::{Channel, Endpoint};

use crate::netns::Network;
use crate::proxy::Proxy;

/// Longest wait for anything that a test waits for.
pub const WAIT_MAX: Duration = Duration::from_secs(60);
/// Where servers listen: below the ports that the system gives to connections going out, of which one could take the port of a
/// server that is stopped and started again.
const PORTS: std::ops::Range<u16> = 12_000..32_000;

/// Set by who has just built the whole workspace: then the binary lies there. To build it by itself compiles half of the workspace
/// once more, with the features that it alone asks for. No name of a setting: the server refuses those that it does not know.
const IS_BUILT: &str = "SERVER_BINARY_IS_BUILT";

/// The `mainstay` binary of the profile that the tests are built in, built if it is not up to date.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let test = std::env::current_exe().expect("a test knows its own path");
        // target/PROFILE/deps/TEST
        let folder = test.ancestors().nth(2).expect("tests lie two folders below the target folder");
        let binary = folder.join("mainstay");
        if std::env::var_os(IS_BUILT).is_some() && binary.is_file() {
            return binary;
        }
        let profile = match folder.file_name().and_then(|name| name.to_str()) {
            Some("debug") | None => "dev",
            Some(other) => other,
        };
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "--package", "mainstay-server", "--bin", "mainstay", "--profile", profile])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status()
            .expect("cargo can be run");
        assert!(built.success(), "the server builds");
        binary
    })
}

/// Polls `done` until it answers true.
///
/// # Panics
/// After [`WAIT_MAX`], naming `what`.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < WAIT_MAX, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// One `mainstay serve` process; ended with SIGKILL when dropped.
pub struct Server {
    /// Its name.
    pub name: String,
    /// Where its volume lies.
    pub data: PathBuf,
    /// Its client port.
    pub client: String,
    /// Where peers reach it.
    pub peer: String,
    /// Its peer port: the same, unless something stands before it.
    listen_peer: String,
    /// Its admin port.
    pub admin: String,
    arguments: Vec<String>,
    /// The network namespace that it runs in, if any.
    namespace: Option<String>,
    /// The server to run in place of the one of this build.
    pub program: Option<PathBuf>,
    log: PathBuf,
    process: Option<Child>,
}

impl Server {
    /// Describes a server; [`Server::start`] runs it. Ports are free ones of loopback.
    pub fn new(name: &str, data: &Path, log: &Path) -> Self {
        let address = || format!("127.0.0.1:{}", free_port());
        let peer = address();
        Self {
            name: name.into(),
            data: data.into(),
            client: address(),
            listen_peer: peer.clone(),
            peer,
            admin: address(),
            arguments: Vec::new(),
            namespace: None,
            program: None,
            log: log.into(),
            process: None,
        }
    }

    /// Adds flags of `mainstay serve`.
    pub fn arguments<S: Into<String>>(&mut self, arguments: impl IntoIterator<Item = S>) -> &mut Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Starts the process; it must not run.
    pub fn start(&mut self) {
        assert!(self.process.is_none(), "{} runs already", self.name);
        let log = std::fs::File::options().create(true).append(true).open(&self.log).expect("the log can be written");
        let program = self.program.as_deref().unwrap_or_else(|| binary());
        let mut command = match &self.namespace {
            None => Command::new(program),
            Some(namespace) => {
                // It takes the place of `ip`, under the same process id.
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(program);
                command
            }
        };
        let process = command
            .arg("serve")
            .args(["--name", &self.name, "--data"])
            .arg(&self.data)
            .args(["--listen", &self.client, "--listen-peer", &self.listen_peer, "--listen-admin", &self.admin])
            .args(["--listen-metrics", "none"])
            .args(&self.arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file handle can be copied"))
            .stderr(log)
            .spawn()
            .expect("the server starts");
        self.process = Some(process);
    }

    /// SIGSTOP: the process runs nothing until [`Server::resume`], while the kernel keeps its connections.
    pub fn pause(&self) {
        self.signal(rustix::process::Signal::STOP);
    }

    /// SIGCONT.
    pub fn resume(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let process = self.process.as_ref().expect("the server runs");
        let id = rustix::process::Pid::from_child(process);
        rustix::process::kill_process(id, signal).expect("a child can be signalled");
    }

    /// True while the process runs.
    pub fn runs(&mut self) -> bool {
        match &mut self.process {
            Some(process) => process.try_wait().expect("a child can be waited for").is_none(),
            None => false,
        }
    }

    /// The process id, while it runs.
    pub fn id(&self) -> Option<u32> {
        self.process.as_ref().map(Child::id)
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("a child can be killed");
            process.wait().expect("a child can be waited for");
        }
    }

    /// SIGTERM, waits for the end, and returns whether it ended with status 0.
    pub fn stop(&mut self) -> bool {
        let Some(mut process) = self.process.take() else { return true };
        let id = rustix::process::Pid::from_child(&process);
        rustix::process::kill_process(id, rustix::process::Signal::TERM).expect("a child can be signalled");
        let mut status = None;
        until("the server ends after SIGTERM", || {
            status = process.try_wait().expect("a child can be waited for");
            status.is_some()
        });
        status.is_some_and(|status| status.success())
    }

    /// Runs a command of the same binary and returns what it printed.
    pub fn run(&self, arguments: &[&str]) -> Output {
        Command::new(binary()).args(arguments).stdin(Stdio::null()).output().expect("the binary runs")
    }

    /// The `/status` document, if the server answers.
    pub fn status(&self) -> Option<serde_json::Value> {
        let output = self.run(&["status", "--json", "--admin", &self.admin, "--timeout", "2s"]);
        serde_json::from_slice(&output.stdout).ok()
    }

    /// A connection to the client port, made when it is used.
    pub fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.client))
            .expect("an address of loopback is a URI")
            .timeout(Duration::from_secs(5))
            .connect_timeout(Duration::from_secs(1))
            .tcp_nodelay(true)
            .connect_lazy()
    }

    /// What the server has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(15).collect();
            eprintln!("--- last lines of {}:", self.name);
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}

/// Three servers over one temporary folder.
pub struct Cluster {
    /// The servers, `a`, `b`, `c`.
    pub servers: Vec<Server>,
    folder: tempfile::TempDir,
}

impl Cluster {
    /// Starts three servers with these further flags and gives birth to the cluster.
    pub fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        Self::describe(folder, &["a", "b", "c"], arguments).born()
    }

    /// Starts three servers, the volume of one of which is `device`, and gives birth to the cluster.
    pub fn start_with_device(server: usize, device: &Path, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let mut cluster = Self::describe(folder, &["a", "b", "c"], arguments);
        cluster.servers[server].data = device.to_owned();
        cluster.born()
    }

    /// Describes servers over `folder` without starting them.
    pub fn describe(folder: tempfile::TempDir, names: &[&str], arguments: &[&str]) -> Self {
        let servers: Vec<_> = names
            .iter()
            .map(|name| Server::new(name, &folder.path().join(name), &folder.path().join(format!("{name}.log"))))
            .collect();
        Self::assemble(folder, servers, arguments)
    }

    /// Starts three servers, each in its namespace of `network`, and gives birth to the cluster.
    pub fn start_in(network: &Network, arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let mut cluster = Self::describe(folder, &["a", "b", "c"], &[]);
        for (i, server) in cluster.servers.iter_mut().enumerate() {
            server.client = format!("{}:2379", network.client_address(i));
            server.admin = format!("{}:2381", network.client_address(i));
            server.peer = format!("{}:2380", network.peer_address(i));
            server.listen_peer.clone_from(&server.peer);
            server.namespace = Some(network.namespace(i));
            server.arguments = vec!["--insecure-listen-anywhere".to_owned()];
        }
        Self::assemble(cluster.folder, cluster.servers, arguments).born()
    }

    /// Starts three servers whose peers reach them through a proxy each, and gives birth to the cluster.
    pub fn start_behind_proxies(arguments: &[&str]) -> (Self, Vec<Proxy>) {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let mut cluster = Self::describe(folder, &["a", "b", "c"], &[]);
        let proxies: Vec<_> = cluster.servers.iter().map(|server| Proxy::start(&server.listen_peer)).collect();
        for (server, proxy) in cluster.servers.iter_mut().zip(&proxies) {
            server.peer = proxy.address();
            server.arguments.clear();
        }
        (Self::assemble(cluster.folder, cluster.servers, arguments).born(), proxies)
    }

    fn born(mut self) -> Self {
        self.servers.iter_mut().for_each(Server::start);
        self.init();
        self
    }

    /// Tells every server where its peers are.
    fn assemble(folder: tempfile::TempDir, mut servers: Vec<Server>, arguments: &[&str]) -> Self {
        let peers: Vec<_> = servers.iter().map(|server| format!("{}={}", server.name, server.peer)).collect();
        for server in &mut servers {
            server.arguments(["--peers", &peers.join(",")]).arguments(arguments.iter().copied());
        }
        Self { servers, folder }
    }

    /// Gives every server another address for peers, 127.0.0.2 and so on, as pods come back under another one, and tells all of them
    /// that of `seed` and no other. None may run.
    pub fn move_all(&mut self, seed: usize) {
        for (i, server) in self.servers.iter_mut().enumerate() {
            server.peer = format!("127.0.0.{}:{}", i + 2, free_port());
            server.listen_peer.clone_from(&server.peer);
        }
        let known = format!("{}={}", self.servers[seed].name, self.servers[seed].peer);
        for server in &mut self.servers {
            let at = server.arguments.iter().position(|argument| argument == "--peers");
            let peers = at.and_then(|at| server.arguments.get_mut(at + 1)).expect("every server was told its peers");
            peers.clone_from(&known);
        }
    }

    /// Which server leads, as one of `among` says that it leads itself.
    pub fn leader_among(&self, among: &[usize]) -> usize {
        let mut leader = None;
        until("one of these servers leads", || {
            let leads = |i: &&usize| {
                let status = self.servers[**i].status();
                status.is_some_and(|status| role(&status).as_deref() == Some("leader"))
            };
            leader = among.iter().find(leads).copied();
            leader.is_some()
        });
        leader.expect("the wait ended with a leader")
    }

    /// Hands leadership to this server, again until it says that it leads.
    pub fn transfer_to(&self, to: usize) {
        until("leadership is handed over", || {
            let from = self.leader();
            if from != to {
                // A refusal, or an election that another won, is seen by the next look.
                let from = &self.servers[from];
                from.run(&["transfer-leader", "--to", &self.servers[to].name, "--admin", &from.admin]);
            }
            from == to
        });
    }

    /// Gives birth to the cluster over all servers.
    pub fn init(&self) {
        let members: Vec<_> = self.servers.iter().map(|server| server.name.as_str()).collect();
        let first = &self.servers[0];
        let output = first.run(&["init", "--members", &members.join(","), "--admin", &first.admin]);
        assert!(output.status.success(), "init: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The folder of volumes and logs.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Which server leads, once exactly one says so and all that answer agree.
    pub fn leader(&self) -> usize {
        let mut leader = None;
        until("a server leads", || {
            leader = self
                .servers
                .iter()
                .position(|server| server.status().is_some_and(|status| role(&status).as_deref() == Some("leader")));
            leader.is_some()
        });
        leader.expect("the wait ended with a leader")
    }
}

/// The role in a status document, wherever it stands.
fn role(status: &serde_json::Value) -> Option<String> {
    match status {
        serde_json::Value::Object(map) => {
            map.get("role").and_then(|role| role.as_str()).map(str::to_owned).or_else(|| map.values().find_map(role))
        }
        serde_json::Value::Array(items) => items.iter().find_map(role),
        _ => None,
    }
}

/// A port of loopback that nobody listens on now.
fn free_port() -> u16 {
    static TRIED: AtomicU32 = AtomicU32::new(0);
    // Processes of tests run side by side: each begins elsewhere.
    let begin = std::process::id().wrapping_mul(131);
    for _ in 0..PORTS.len() {
        let at = begin.wrapping_add(TRIED.fetch_add(1, Ordering::Relaxed)) % PORTS.len() as u32;
        let port = PORTS.start + at as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("loopback has no free port in {PORTS:?}");
}
