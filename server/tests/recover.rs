//! A cluster of real processes that has lost two of three volumes for good, taken up again by the command line.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Output, Stdio};

/// A process that is killed by its id when the test ends, however it ends.
struct Server {
    process: Child,
    /// Kept open: a process that cannot log ends.
    _lines: std::io::Lines<BufReader<ChildStderr>>,
}

impl Server {
    /// Starts `serve` on the ports for client, peer and admin, and waits for the log line that says that it serves.
    fn start(name: &str, data: &Path, ports: &[String; 3], peers: &str) -> Self {
        let mut command = mainstay();
        command.arg("serve").args(["--name", name, "--peers", peers, "--wal", "8MiB", "--memory", "32MiB"]);
        command.arg("--data").arg(data).args(["--listen", &ports[0], "--listen-peer", &ports[1]]);
        command.args(["--listen-admin", &ports[2], "--listen-metrics", "none"]);
        let mut process = command.stderr(Stdio::piped()).spawn().expect("starts");
        let mut lines = BufReader::new(process.stderr.take().expect("piped")).lines();
        let serves = lines.by_ref().map_while(Result::ok).any(|line| line.contains("\"message\":\"serving\""));
        assert!(serves, "the log ended before it served");
        Self { process, _lines: lines }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn mainstay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("MAINSTAY_") {
            command.env_remove(name);
        }
    }
    command
}

fn run(args: &[&str]) -> Output {
    mainstay().args(args).output().expect("runs")
}

fn json(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}");
    serde_json::from_slice(&output.stdout).expect("one JSON document")
}

fn refused(output: &Output, status: i32, why: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(status) && text.contains(why), "{:?}: {text}", output.status);
}

fn ports() -> [String; 3] {
    let bound = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    bound.map(|listener| listener.local_addr().expect("bound").to_string())
}

#[test]
fn a_cluster_that_lost_two_of_three_goes_on_from_the_third_and_grows_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let names = ["a", "b", "c"];
    let ports = names.map(|_| ports());
    let peers: Vec<String> = names.iter().zip(&ports).map(|(name, ports)| format!("{name}={}", ports[1])).collect();
    let peers = peers.join(",");
    let data = names.map(|name| folder.path().join(name));
    let start = |i: usize| Server::start(names[i], &data[i], &ports[i], &peers);
    let mut servers: Vec<Server> = (0..3).map(start).collect();
    json(&run(&["init", "--members", "a,b,c", "--admin", &ports[0][2], "--json"]));
    let at = ["--endpoints", &ports[0][0], "--json"];
    json(&run(&[&["bench", "--ops", "100", "--durability", "all"], &at[..]].concat()));

    let path = data[2].to_str().expect("a path of this test");
    let in_use = run(&["recover", "--data", path, "--plan"]);
    refused(&in_use, 1, "Locked");
    // All lose power, and two volumes are lost with it.
    servers.clear();
    for lost in &data[..2] {
        std::fs::remove_dir_all(lost).expect("removed");
    }
    let plan = json(&run(&["recover", "--data", path, "--plan", "--json"]));
    let survivor = &plan["survivor"];
    assert!(survivor["last_log"].as_u64() >= Some(100) && survivor["term"].as_u64() >= Some(1), "{plan:#}");
    assert_eq!((&survivor["node"], &plan["unread_voters"]), (&3.into(), &serde_json::json!([1, 2])), "{plan:#}");
    assert_eq!((&plan["lossless"], &plan["applied"]), (&false.into(), &false.into()));
    assert_eq!(plan["lost_from"].as_u64(), survivor["last_log"].as_u64().map(|last| last + 1));
    let text = run(&["recover", "--data", path, "--plan"]);
    let digest = plan["digest"].as_str().expect("text");
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("MAY BE LOST") && text.contains(digest) && text.contains("given up"), "{text}");

    refused(&run(&["recover", "--data", path]), 2, "--plan");
    refused(&run(&["recover", "--data", path, "--apply"]), 2, "--confirm");
    refused(&run(&["recover", "--data", path, "--apply", "--confirm", "00"]), 1, "confirmed plan");
    let done = json(&run(&["recover", "--data", path, "--apply", "--confirm", digest, "--json"]));
    assert_eq!((&done["applied"], &done["digest"]), (&true.into(), &plan["digest"]));

    let survivor = start(2);
    // The others come back with blank volumes, and are added like new machines.
    let blank = [start(0), start(1)];
    let admin = ["--admin", &ports[2][2], "--json"];
    for i in [0, 1] {
        json(&run(&[&["member", "add", names[i], &ports[i][1], "--timeout", "60s"], &admin[..]].concat()));
    }
    let members = json(&run(&[&["member", "list"], &admin[..]].concat()));
    let voters = members.as_array().expect("a list").iter().filter(|member| member["voter"] == true).count();
    assert_eq!(voters, 3, "{members:#}");
    let at = ["--endpoints", &ports[0][0], "--json"];
    let bench = json(&run(&[&["bench", "--workload", "mixed", "--ops", "100"], &at[..]].concat()));
    assert_eq!(bench["errors"], 0, "{bench:#}");
    drop((survivor, blank));
}
