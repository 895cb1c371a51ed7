//! Servers in network namespaces of their own, whose links to each other can be cut, one way or both, and slowed.
//!
//! ```text
//!   test process ── link to each server (clients, admin) ── namespace of the server ── switch (peers), a namespace without a way out
//! ```
//!
//! Cuts are made between the servers alone, so a test still asks a server that is cut off from the others.
//!
//! # Invariants
//! 1. Namespaces, links and their addresses go away when the [`Network`] is dropped, also when the test panics.
//! 2. The peers' network has no way to the machine. The links of clients are point to point, with addresses of 198.18.0.0/15, which
//!    are never routed (RFC 2544).

use std::net::Ipv4Addr;
use std::process::Command;

/// What a server sends to its peers is dropped by a classic BPF program of one instruction: return `TC_ACT_SHOT`.
const DROP_ALL: [&str; 4] = ["bpf", "da", "bytecode", "1,6 0 0 2"];
/// First address of the links of clients.
const CLIENTS: u32 = u32::from_be_bytes([198, 18, 0, 0]);

/// Namespaces of some servers and the switch between them.
pub struct Network {
    tag: String,
    first: u32,
    servers: usize,
}

impl Network {
    /// Makes namespaces for `servers`. `None`, with the reason printed, where the machine lacks the rights or the means.
    pub fn create(servers: usize) -> Option<Self> {
        let process = std::process::id();
        // Processes of a run have numbers near each other: links of 4 addresses, up to 8 for a network, 4096 networks.
        let network = Self { tag: format!("mt{process}"), first: CLIENTS + (process % 4096) * 32, servers };
        assert!(servers <= 8, "a network has at most 8 servers");
        match network.make() {
            Ok(()) => Some(network),
            Err(reason) => {
                eprintln!("not run: no network namespaces here: {reason}");
                None
            }
        }
    }

    fn make(&self) -> Result<(), String> {
        let switch = self.switch();
        run(&["ip", "netns", "add", &switch])?;
        run(&["ip", "-n", &switch, "link", "add", "bridge", "type", "bridge"])?;
        run(&["ip", "-n", &switch, "link", "set", "bridge", "up"])?;
        for i in 0..self.servers {
            let (space, port, client) = (self.namespace(i), format!("port{i}"), format!("{}c{i}", self.tag));
            run(&["ip", "netns", "add", &space])?;
            run(&["ip", "-n", &space, "link", "set", "lo", "up"])?;
            run(&[
                "ip", "-n", &space, "link", "add", "peers", "type", "veth", "peer", "name", &port, "netns", &switch,
            ])?;
            run(&["ip", "-n", &switch, "link", "set", &port, "master", "bridge", "up"])?;
            run(&["ip", "-n", &space, "addr", "add", &format!("{}/24", self.peer_address(i)), "dev", "peers"])?;
            run(&["ip", "-n", &space, "link", "set", "peers", "up"])?;
            run(&["ip", "link", "add", &client, "type", "veth", "peer", "name", "clients", "netns", &space])?;
            let [here, there] = self.link(i);
            run(&["ip", "addr", "add", &format!("{here}/30"), "dev", &client])?;
            run(&["ip", "link", "set", &client, "up"])?;
            run(&["ip", "-n", &space, "addr", "add", &format!("{there}/30"), "dev", "clients"])?;
            run(&["ip", "-n", &space, "link", "set", "clients", "up"])?;
        }
        // What cuts links must work here, else a test of partitions would test nothing.
        self.cut(&self.namespace(0), "peers")?;
        self.mend(0);
        Ok(())
    }

    fn switch(&self) -> String {
        format!("{}s", self.tag)
    }

    fn link(&self, i: usize) -> [Ipv4Addr; 2] {
        let first = self.first + 4 * i as u32;
        [Ipv4Addr::from_bits(first + 1), Ipv4Addr::from_bits(first + 2)]
    }

    /// The namespace of a server.
    pub fn namespace(&self, i: usize) -> String {
        format!("{}n{i}", self.tag)
    }

    /// Where peers reach a server.
    pub fn peer_address(&self, i: usize) -> Ipv4Addr {
        // TEST-NET-1, in a network of its own.
        Ipv4Addr::new(192, 0, 2, 1 + i as u8)
    }

    /// Where the test reaches a server.
    pub fn client_address(&self, i: usize) -> Ipv4Addr {
        self.link(i)[1]
    }

    fn cut(&self, namespace: &str, device: &str) -> Result<(), String> {
        let tc = ["tc", "-n", namespace];
        run(&[&tc[..], &["qdisc", "add", "dev", device, "clsact"]].concat())?;
        run(&[&tc[..], &["filter", "add", "dev", device, "egress"], &DROP_ALL[..]].concat())
    }

    /// From now on no peer hears this server.
    pub fn mute(&self, i: usize) {
        self.cut(&self.namespace(i), "peers").expect("a link that could be cut before can be cut");
    }

    /// From now on this server hears no peer.
    pub fn deafen(&self, i: usize) {
        self.cut(&self.switch(), &format!("port{i}")).expect("a link that could be cut before can be cut");
    }

    /// Ends what [`Network::mute`], [`Network::deafen`] and [`Network::slow`] have done to this server.
    pub fn mend(&self, i: usize) {
        let (space, switch, port) = (self.namespace(i), self.switch(), format!("port{i}"));
        // What was not cut cannot be mended: that is an answer and no failure.
        for (namespace, device) in [(&space, "peers"), (&switch, port.as_str())] {
            for kind in ["clsact", "root"] {
                let _ = run(&["tc", "-n", namespace, "qdisc", "del", "dev", device, kind]);
            }
        }
    }

    /// Slows what this server sends to its peers: a delay where the kernel has netem, else a rate so low that packets queue.
    /// Returns what was done.
    pub fn slow(&self, i: usize) -> String {
        let space = self.namespace(i);
        let add = ["tc", "-n", &space, "qdisc", "add", "dev", "peers", "root"];
        let delay = ["netem", "delay", "40ms", "30ms"];
        match run(&[&add[..], &delay[..]].concat()) {
            Ok(()) => delay.join(" "),
            Err(reason) => {
                let rate = ["tbf", "rate", "800kbit", "burst", "4kb", "latency", "300ms"];
                run(&[&add[..], &rate[..]].concat()).expect("the kernel can limit a rate");
                format!("{} (no netem here: {reason})", rate.join(" "))
            }
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for i in 0..self.servers {
            // The other end goes with it.
            let _ = run(&["ip", "link", "del", &format!("{}c{i}", self.tag)]);
            let _ = run(&["ip", "netns", "del", &self.namespace(i)]);
        }
        let _ = run(&["ip", "netns", "del", &self.switch()]);
    }
}

/// Runs a program; what it says is the error.
fn run(command: &[&str]) -> Result<(), String> {
    let (program, arguments) = command.split_first().expect("a command has a program");
    let output = Command::new(program).args(arguments).output().map_err(|e| format!("{program}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{}: {}", command.join(" "), said.trim().lines().last().unwrap_or_default()))
}
