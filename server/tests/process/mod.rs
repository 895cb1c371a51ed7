//! One process of `mainstay serve` and the ways to talk to it.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};

use rustix::process::{Pid, Signal, kill_process};

/// Free ports for one process: client, peer, admin, metrics.
pub(crate) struct Ports([String; 4]);

impl Ports {
    pub(crate) fn free() -> Self {
        let bound: Vec<TcpListener> = (0..4).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
        let addresses: Vec<String> = bound.iter().map(|l| l.local_addr().expect("bound").to_string()).collect();
        Self(addresses.try_into().expect("four of four"))
    }

    pub(crate) fn client(&self) -> &str {
        &self.0[0]
    }

    pub(crate) fn peer(&self) -> &str {
        &self.0[1]
    }

    pub(crate) fn admin(&self) -> &str {
        &self.0[2]
    }

    pub(crate) fn metrics(&self) -> &str {
        &self.0[3]
    }
}

pub(crate) fn mainstay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MAINSTAY_") {
            command.env_remove(name);
        }
    }
    command
}

/// A process that is killed by its id when the test ends, however it ends.
pub(crate) struct Server {
    process: Child,
    /// What it logs. Taken off the pipe as it comes: a process whose pipe is full stands still at its next line.
    lines: Receiver<String>,
}

impl Server {
    /// Starts `serve` and waits for the log line that says that it serves.
    pub(crate) fn start(name: &str, data: &Path, ports: &Ports, peers: &str) -> Self {
        Self::start_with(name, data, ports, peers, &[])
    }

    /// As [`Server::start`] with further arguments.
    pub(crate) fn start_with(name: &str, data: &Path, ports: &Ports, peers: &str, args: &[&str]) -> Self {
        let mut command = mainstay();
        command.arg("serve").args(["--name", name, "--peers", peers, "--wal", "8MiB", "--memory", "32MiB"]);
        command.arg("--data").arg(data).args(["--listen", ports.client(), "--listen-peer", ports.peer()]);
        command.args(["--listen-admin", ports.admin(), "--listen-metrics", ports.metrics()]).args(args);
        let mut process = command.stderr(Stdio::piped()).spawn().expect("starts");
        let log = BufReader::new(process.stderr.take().expect("piped"));
        let (line, lines) = channel();
        // Ends with the process, or with the last line that somebody could still ask for.
        std::thread::spawn(move || log.lines().map_while(Result::ok).try_for_each(|text| line.send(text)));
        let mut server = Self { process, lines };
        server.line_with("\"message\":\"serving\"");
        server
    }

    /// The next line of the log that holds `text`. Every line is one JSON object with the stable keys.
    pub(crate) fn line_with(&mut self, text: &str) -> serde_json::Value {
        for line in self.lines.iter() {
            let object: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            assert!(object["time"].is_string() && object["member"].is_string(), "{line}");
            if line.contains(text) {
                return object;
            }
        }
        panic!("the log ended without {text}");
    }

    pub(crate) fn stop(mut self) {
        kill_process(Pid::from_child(&self.process), Signal::TERM).expect("told");
        self.line_with("\"message\":\"closed\"");
        let status = self.process.wait().expect("ends");
        assert_eq!(status.code(), Some(0));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One HTTP/1.1 request: status and body.
pub(crate) fn get(address: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("connects");
    let mut answer = Vec::new();
    // A port that does not speak HTTP/1 answers with what is no HTTP/1, or resets the connection, perhaps before it has all.
    let _ = write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_default();
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    (status, body)
}

pub(crate) fn run(args: &[&str]) -> Output {
    mainstay().args(args).output().expect("runs")
}

pub(crate) fn json(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}");
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Given back and removed when dropped.
pub(crate) struct LoopDevice(pub(crate) PathBuf);

impl LoopDevice {
    pub(crate) fn over(file: &Path, bytes: u64) -> Option<Self> {
        std::fs::File::create(file).and_then(|file| file.set_len(bytes)).expect("a sparse file");
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok();
        let made = made.filter(|made| made.status.success());
        if made.is_none() {
            eprintln!("no loop device on this machine: raw devices are not tested");
        }
        made.map(|made| Self(String::from_utf8_lossy(&made.stdout).trim().into()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.0).status();
    }
}
