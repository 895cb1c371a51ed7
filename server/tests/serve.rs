//! Real processes: birth, writes, ports, settings, a clean stop.

mod process;

use std::time::{Duration, Instant};

use mainstay_server::proto::etcdserverpb::kv_client::KvClient;
use mainstay_server::proto::etcdserverpb::{PutRequest, RangeRequest};
use mainstay_server::proto::mainstay::v1 as pb;
use process::{Ports, Server, get, json, mainstay, run, runtime};

#[test]
fn one_replica_is_born_written_stopped_and_found_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("a");
    let ports = Ports::free();
    let server = Server::start("a", &data, &ports, "");
    assert_eq!(get(ports.admin(), "/livez").0, 200, "alive before birth");
    assert_eq!(get(ports.admin(), "/readyz"), (503, "not a member: waiting\n".into()));

    let init = ["init", "--members", "a", "--admin", ports.admin(), "--json"];
    let born = json(&run(&init));
    assert_eq!(born["cluster"].as_str().map(str::len), Some(32));
    assert_eq!(json(&run(&init)), born, "the same call again finds the cluster");

    let address = format!("http://{}", ports.client());
    runtime().block_on(async {
        let mut kv = KvClient::connect(address.clone()).await.expect("connects");
        let put = PutRequest { key: "k".into(), value: "v".into(), ..PutRequest::default() };
        kv.put(put).await.expect("written");
    });
    assert_eq!(get(ports.admin(), "/readyz").0, 200);
    server.stop();

    let server = Server::start("a", &data, &ports, "");
    runtime().block_on(async {
        let mut kv = KvClient::connect(address).await.expect("connects");
        let found = loop {
            // No leader yet: the one voter elects itself first.
            match kv.range(RangeRequest { key: "k".into(), ..RangeRequest::default() }).await {
                Ok(answer) => break answer.into_inner(),
                Err(status) => assert_eq!(status.code(), tonic::Code::Unavailable, "{status}"),
            }
        };
        assert_eq!(found.kvs.first().map(|pair| &pair.value[..]), Some(&b"v"[..]));
    });
    server.stop();
}

#[test]
fn each_port_serves_its_own_and_nothing_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let ports = Ports::free();
    let server = Server::start("a", &folder.path().join("a"), &ports, "");
    json(&run(&["init", "--members", "a", "--admin", ports.admin(), "--json"]));

    for path in ["/livez", "/readyz", "/status", "/metrics"] {
        let (status, _) = get(ports.client(), path);
        assert_ne!(status, 200, "{path} is not for clients");
    }
    assert_ne!(get(ports.admin(), "/metrics").0, 200);
    assert_ne!(get(ports.metrics(), "/status").0, 200);
    let (status, metrics) = get(ports.metrics(), "/metrics");
    assert_eq!(status, 200);
    for name in [
        "mainstay_raft_term",
        "mainstay_log_batches_total",
        "mainstay_log_write_seconds_count",
        "mainstay_raft_apply_lag",
        "mainstay_raft_apply_lag_seconds_sum",
        "mainstay_raft_groups 0\n",
        "mainstay_raft_groups_without_leader 0\n",
        // As `--memory` was given, and a sixth of it.
        "mainstay_engine_memory_bytes 33554432\n",
        "mainstay_engine_memory_allocator_bytes 6710886\n",
        "mainstay_engine_write_amplification ",
        "mainstay_engine_compaction_bytes_total{level=\"6\"}",
        "mainstay_engine_stall_seconds_count{cause=\"memory\"}",
        "mainstay_ready",
    ] {
        assert!(metrics.contains(name), "{name} is missing in\n{metrics}");
    }
    runtime().block_on(async {
        let init = pb::InitRequest { members: vec!["a".into()] };
        let address = format!("http://{}", ports.client());
        let mut admin = pb::admin_client::AdminClient::connect(address).await.expect("connects");
        let refused = admin.init(init.clone()).await.expect_err("admin is not on the client port");
        assert_eq!(refused.code(), tonic::Code::Unimplemented);
        let address = format!("http://{}", ports.admin());
        let mut admin = pb::admin_client::AdminClient::connect(address.clone()).await.expect("connects");
        admin.init(init).await.expect("admin is on the admin port");
        let mut kv = KvClient::connect(address).await.expect("connects");
        let refused = kv.range(RangeRequest { key: "k".into(), ..RangeRequest::default() }).await;
        assert_eq!(refused.expect_err("no data on the admin port").code(), tonic::Code::Unimplemented);
    });
    let (_, metrics) = get(ports.metrics(), "/metrics");
    assert!(metrics.contains("code=\"Unimplemented\""), "requests are counted by code\n{metrics}");
    server.stop();
}

#[test]
fn the_status_has_the_promised_keys_and_a_line_for_each_layer() {
    let folder = tempfile::tempdir().expect("a folder");
    let ports = Ports::free();
    let server = Server::start_with("a", &folder.path().join("a"), &ports, "", &["--site-lag-max", "here=1MiB/5s"]);
    json(&run(&["init", "--members", "a", "--admin", ports.admin(), "--json"]));
    assert!(run(&["member", "set", "a", "--site", "here", "--admin", ports.admin()]).status.success());
    assert!(run(&["group", "create", "east", "--endpoints", ports.client()]).status.success());
    // A leader looks at its sites twice a second, and the group has one when it has elected it. Health is none that a busy disk changes.
    let end = Instant::now() + Duration::from_secs(20);
    let status = loop {
        let status = serde_json::from_slice(&run(&["status", "--admin", ports.admin(), "--json"]).stdout);
        let status: serde_json::Value = status.expect("one JSON document");
        if status[0]["raft"]["site_lags"][0].is_object() && status[0]["raft"]["groups"][0]["leader_name"] == "a" {
            break status;
        }
        assert!(Instant::now() < end, "{status:#}");
    };
    let (_, metrics) = get(ports.metrics(), "/metrics");
    assert!(metrics.contains("mainstay_raft_site_lag_beyond{site=\"here\"} 0"), "{metrics}");
    let status = &status[0];
    for key in include_str!("../testdata/status_keys.txt").lines() {
        let key = key.replace("raft.members.", "raft.members.0.").replace("raft.site_lags.", "raft.site_lags.0.");
        let key = key.replace("engine.stalls.", "engine.stalls.0.").replace("raft.groups.", "raft.groups.0.");
        let pointer = format!("/{}", key.replace('.', "/"));
        assert!(status.pointer(&pointer).is_some(), "{key} is missing in {status:#}");
    }
    assert_eq!(status["member"], "a");
    assert_eq!(status["engine"]["memory_bytes"], 32 << 20, "as --memory was given");
    assert_eq!(status["engine"]["memory_allocator_bytes"], (32 << 20) / 5);
    assert_eq!(status["raft"]["members"][0]["name"], "a");
    let group = &status["raft"]["groups"][0];
    assert_eq!((&group["name"], &group["role"]), (&"east".into(), &"leader".into()), "{group}");
    assert!(status["verdicts"]["raft"]["line"].as_str().is_some_and(|line| line.ends_with("1 group beside the first")));
    let text = run(&["status", "--admin", ports.admin()]);
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    for layer in ["disk", "log", "raft", "engine", "group"] {
        assert_eq!(text.lines().filter(|line| line.trim_start().starts_with(layer)).count(), 1, "{text}");
    }
    let members = json(&run(&["member", "list", "--admin", ports.admin(), "--json"]));
    assert_eq!(members[0]["voter"], true);
    server.stop();
}

#[test]
fn finalize_says_which_version_the_cluster_has() {
    let folder = tempfile::tempdir().expect("a folder");
    let ports = Ports::free();
    let server = Server::start("a", &folder.path().join("a"), &ports, "");
    let at = ["--admin", ports.admin()];
    let on = |args: &[&str]| run(&[args, &at[..]].concat());
    let newest = mainstay::CLUSTER_VERSION_MAX;
    let early = on(&["finalize"]);
    let text = String::from_utf8_lossy(&early.stderr).into_owned();
    assert!(early.status.code() == Some(1) && !text.is_empty(), "there is no cluster yet: {text}");
    json(&on(&["init", "--members", "a", "--json"]));
    let raft = json(&on(&["status", "--json"]))[0]["raft"].take();
    assert_eq!((&raft["cluster_version"], &raft["cluster_version_max"]), (&newest.into(), &newest.into()), "{raft}");
    assert_eq!(json(&on(&["finalize", "--json"])), serde_json::json!({ "cluster_version": newest }));
    assert_eq!(String::from_utf8_lossy(&on(&["finalize"]).stdout), format!("cluster version={newest}\n"));
    server.stop();
}

#[test]
fn a_member_is_given_a_priority_and_a_site() {
    let folder = tempfile::tempdir().expect("a folder");
    let ports = Ports::free();
    let server = Server::start("a", &folder.path().join("a"), &ports, "");
    let at = ["--admin", ports.admin()];
    let on = |args: &[&str]| run(&[args, &at[..]].concat());
    let with_json = |args: &[&str]| json(&on(&[args, &["--json"]].concat()));
    with_json(&["init", "--members", "a"]);
    let check = |priority: u64, site: &str| {
        let member = with_json(&["member", "list"])[0].take();
        assert_eq!((&member["priority"], &member["site"]), (&priority.into(), &site.into()), "{member}");
        let member = with_json(&["status"])[0]["raft"]["members"][0].take();
        assert_eq!((&member["priority"], &member["site"]), (&priority.into(), &site.into()), "{member}");
    };
    check(0, "");
    let id = with_json(&["member", "list"])[0]["id"].as_u64().expect("an id");
    let done = with_json(&["member", "set", "a", "--priority", "7", "--site", "north"]);
    assert_eq!(done, serde_json::json!({ "set": id, "priority": 7, "site": "north" }));
    check(7, "north");
    for command in ["member list", "status"] {
        let output = on(&command.split(' ').collect::<Vec<_>>());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("north") && text.contains("priority=7"), "{command}: {text}");
    }
    // One of the two leaves the other as it is.
    let output = on(&["member", "set", &id.to_string(), "--priority", "255"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text, format!("set {id} id={id} priority=255\n"));
    check(255, "north");
    with_json(&["member", "set", "a", "--site", ""]);
    check(255, "");

    let unknown = on(&["member", "set", "b", "--priority", "1"]);
    let text = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(unknown.status.code() == Some(1) && text.contains("no such member member=b"), "{text}");
    runtime().block_on(async {
        let address = format!("http://{}", ports.admin());
        let mut admin = pb::admin_client::AdminClient::connect(address).await.expect("connects");
        let site = |site: &str| Some(site.to_owned());
        let refused = [
            (pb::SetMemberRequest { id, site: None, priority: None }, tonic::Code::InvalidArgument),
            (pb::SetMemberRequest { id, site: site("south"), priority: Some(256) }, tonic::Code::InvalidArgument),
            (pb::SetMemberRequest { id, site: site("south wing"), priority: Some(1) }, tonic::Code::InvalidArgument),
            (pb::SetMemberRequest { id: id + 1, site: site("south"), priority: None }, tonic::Code::NotFound),
            (pb::SetMemberRequest { id: id + 1, site: None, priority: Some(1) }, tonic::Code::NotFound),
        ];
        for (request, code) in refused {
            let status = admin.set_member(request.clone()).await.expect_err("refused");
            assert_eq!(status.code(), code, "{request:?}: {status}");
        }
    });
    check(255, "");
    server.stop();
}

#[test]
fn three_replicas_serve_checkpoints_and_clones_and_hand_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let names = ["a", "b", "c"];
    let ports = [Ports::free(), Ports::free(), Ports::free()];
    let peers: Vec<String> = names.iter().zip(&ports).map(|(name, ports)| format!("{name}={}", ports.peer())).collect();
    let peers = peers.join(",");
    let mut servers: Vec<Option<Server>> = names
        .iter()
        .zip(&ports)
        .map(|(name, ports)| Some(Server::start(name, &folder.path().join(name), ports, &peers)))
        .collect();
    json(&run(&["init", "--members", "a,b,c", "--admin", ports[0].admin(), "--json"]));

    let endpoints = ports.each_ref().map(|ports| ports.client().to_owned()).join(",");
    let bench = json(&run(&["bench", "--ops", "200", "--clients", "8", "--endpoints", &endpoints, "--json"]));
    assert_eq!((&bench["ops"], &bench["errors"]), (&200.into(), &0.into()), "{bench}");

    let at = ["--endpoints", ports[1].client(), "--json"];
    let made = json(&run(&[&["checkpoint", "create", "monday"], &at[..]].concat()));
    assert_eq!(made["name"], "monday");
    json(&run(&[&["clone", "create", "trial", "monday"], &at[..]].concat()));
    let listed = json(&run(&[&["clone", "list"], &at[..]].concat()));
    assert_eq!((&listed[0]["name"], &listed[0]["checkpoint"]), (&"trial".into(), &"monday".into()));
    let taken = run(&[&["checkpoint", "create", "monday"], &at[..]].concat());
    assert_eq!(taken.status.code(), Some(1), "the name is taken");

    let compacted = json(&run(&[&["compact"], &at[..]].concat()));
    assert!(compacted["before_bytes"].is_u64() && compacted["after_bytes"].is_u64(), "{compacted}");
    json(&run(&[&["compact", "etcd.keys", "--clone", "trial"], &at[..]].concat()));
    let absent = run(&[&["compact", "absent"], &at[..]].concat());
    assert_eq!(absent.status.code(), Some(1), "no such keyspace");

    // The leader stops: the others go on, and prestop lets it go at once since they are a quorum.
    let statuses = ports.each_ref().map(|ports| json(&run(&["status", "--admin", ports.admin(), "--json"])));
    let leader = statuses.iter().position(|status| status[0]["raft"]["role"] == "leader").expect("a leader");
    let prestop = json(&run(&["prestop", "--drain", "0s", "--admin", ports[leader].admin(), "--json"]));
    assert_eq!(prestop["reason"], "quorum", "{prestop}");
    servers[leader].take().expect("it runs").stop();
    let other = (leader + 1) % 3;
    let at = ["--endpoints", ports[other].client(), "--json"];
    json(&run(&[&["clone", "drop", "trial"], &at[..]].concat()));
    json(&run(&[&["checkpoint", "drop", "monday"], &at[..]].concat()));
    for server in servers.into_iter().flatten() {
        server.stop();
    }
}

#[test]
fn groups_and_placed_keyspaces_are_operated_from_the_command_line() {
    let folder = tempfile::tempdir().expect("a folder");
    let ports = Ports::free();
    let server = Server::start("a", &folder.path().join("a"), &ports, "");
    json(&run(&["init", "--members", "a", "--admin", ports.admin(), "--json"]));
    let on = |args: &[&str]| run(&[args, &["--endpoints", ports.client()]].concat());
    let with_json = |args: &[&str]| json(&on(&[args, &["--json"]].concat()));
    let text = |args: &[&str]| {
        let output = on(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let made = with_json(&["group", "create", "east"]);
    assert_eq!(made["name"], "east");
    assert_eq!(with_json(&["group", "create", "east"])["number"], made["number"], "the same call again finds it");
    let groups = with_json(&["group", "list"]);
    assert_eq!(
        (&groups[0]["number"], &groups[0]["name"], &groups[0]["leader_name"]),
        (&1.into(), &"".into(), &"a".into())
    );
    assert_eq!((&groups[1]["name"], &groups[1]["number"]), (&made["name"], &made["number"]));
    assert!(text(&["group", "list"]).contains("(the first)"));

    assert_eq!(with_json(&["placed", "create", "users"]), serde_json::json!({ "keyspace": "users" }));
    assert_eq!(with_json(&["placed", "list"]), serde_json::json!(["users"]));
    for (key, value) in [("a", "1"), ("k", "2"), ("z", "3")] {
        assert_eq!(with_json(&["placed", "put", "users", key, value]), serde_json::json!({ "put": key }));
    }
    text(&["placed", "put", "users", "6b00", "ff", "--hex", "--durability", "all"]);
    assert_eq!(with_json(&["range", "split", "users", "k"]), serde_json::json!({ "split": "k" }));
    let moved = with_json(&["range", "move", "users", "k", "--to", "east"]);
    assert_eq!(moved, serde_json::json!({ "moved": "k", "group": "east" }));
    let ranges = serde_json::json!([
        { "first": "", "end": "k", "group": "", "is_moving": false },
        { "first": "k", "end": null, "group": "east", "is_moving": false },
    ]);
    assert_eq!(with_json(&["range", "list", "users"]), ranges);
    assert!(text(&["range", "list", "users", "--hex"]).contains("6b                               group=east\n"));
    assert_eq!(text(&["placed", "get", "users", "z", "--read-level", "lease"]), "3\n");
    assert_eq!(
        with_json(&["placed", "get", "users", "6b00", "--hex"]),
        serde_json::json!({ "key": "6b00", "value": "ff" })
    );
    let scanned = with_json(&["placed", "scan", "users", "--from", "b", "--limit", "2"]);
    let pairs = serde_json::json!([{ "key": "k", "value": "2" }, { "key": "k\\x00", "value": "\\xff" }]);
    assert_eq!(scanned, serde_json::json!({ "pairs": pairs, "next": "z" }));
    assert_eq!(text(&["placed", "scan", "users", "--reverse", "--to", "k"]), "a 1\n");
    text(&["range", "move", "users", "k", "--to", ""]);
    assert_eq!(with_json(&["range", "join", "users", "k"]), serde_json::json!({ "joined": "k" }));
    assert_eq!(with_json(&["range", "list", "users"]).as_array().map(Vec::len), Some(1));
    assert_eq!(with_json(&["placed", "delete", "users", "a"]), serde_json::json!({ "deleted": "a" }));

    let refused = |args: &[&str], status: i32, says: &str| {
        let output = on(args);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(status) && told.contains(says), "{args:?}: {:?} {told}", output.status);
        assert!(output.stdout.is_empty(), "{args:?} prints no result");
    };
    refused(&["placed", "get", "users", "a"], 1, "no such key key=a");
    refused(&["placed", "get", "users", ""], 1, "a key has 1 to 65536 bytes bytes=0");
    refused(&["placed", "get", "usres", "a"], 1, "no such placed keyspace name=usres");
    refused(&["range", "list", "usres"], 1, "no such placed keyspace name=usres");
    refused(&["range", "move", "users", "a", "--to", "north"], 1, "no such group name=north");
    refused(&["range", "split", "users", ""], 1, "bytes=0");
    refused(&["group", "create", ""], 1, "the name of a group is empty");
    refused(&["placed", "put", "users", "a", "1", "--durability", "local"], 1, "answered when it is applied");
    refused(&["placed", "put", "users", "a", "1", "--durability", "fast"], 2, "quorum, all or site:NAME");
    refused(&["placed", "get", "users", "0g", "--hex"], 2, "not hexadecimal");
    refused(&["placed", "scan", "users", "--limit", "0"], 2, "--limit");
    refused(&["range", "move", "users", "a"], 2, "--to");
    let help = run(&["range", "move", "--help"]);
    assert!(String::from_utf8_lossy(&help.stdout).contains("the same command again waits for it"));
    server.stop();
}

#[test]
fn wrong_calls_exit_with_two_and_failures_with_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("utf-8");
    let check = |args: &[&str], status: i32, says: &str| {
        let output = run(args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {text}");
        assert!(text.contains(says), "{args:?} should say '{says}': {text}");
    };
    check(&["serve", "--name", "a"], 2, "data is not set");
    check(&["serve", "--nmae", "a"], 2, "--nmae");
    check(&["serve", "--name", "a", "--data", path, "--listen", "0.0.0.0:1"], 2, "--insecure-listen-anywhere");
    check(&["serve", "--name", "a", "--data", path, "--wal", "1GB"], 2, "GB");
    check(&["checkpoint", "create"], 2, "<NAME>");
    check(&["init", "--members", "a=127.0.0.1:1,b"], 2, "its name alone, here a");
    check(&["member", "set", "a"], 2, "--priority");
    check(&["member", "set", "a", "--priority", "256"], 2, "0..=255");
    check(&["member", "set", "a", "--priority", "high"], 2, "high");
    check(&["member", "set", "a", "--site", "north wing"], 2, "without spaces");
    check(&["status", "--admin", "127.0.0.1:1"], 1, "127.0.0.1:1");
    check(&["status", "--admin", "not an address"], 2, "HOST:PORT");

    let settings = folder.path().join("settings.toml");
    std::fs::write(&settings, "name = 'a'\nhearbeat = '1s'\n").expect("written");
    check(&["serve", "--config", settings.to_str().expect("utf-8")], 2, "hearbeat");
    let output = mainstay().args(["status"]).env("MAINSTAY_ADMNI", "x").output().expect("runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("MAINSTAY_ADMNI"));
    let help = run(&["serve", "--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&help.stdout).contains("MAINSTAY_LISTEN_PEER"));
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let settings = folder.path().join("settings.toml");
    // Each source names an address that is refused, so that the message tells which one was taken.
    std::fs::write(&settings, "name = 'a'\ndata = '/nowhere'\nlisten = '198.51.100.1:1'\n").expect("written");
    let check = |env: Option<&str>, flag: Option<&str>, expect: &str| {
        let mut command = mainstay();
        command.args(["serve", "--config"]).arg(&settings);
        if let Some(address) = env {
            command.env("MAINSTAY_LISTEN", address);
        }
        if let Some(address) = flag {
            command.args(["--listen", address]);
        }
        let output = command.output().expect("runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(expect), "{text}");
    };
    check(None, None, "198.51.100.1");
    check(Some("198.51.100.2:1"), None, "198.51.100.2");
    check(Some("198.51.100.2:1"), Some("198.51.100.3:1"), "198.51.100.3");
}

#[test]
fn a_volume_is_laid_out_once_and_by_force_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("volume");
    let data = data.to_str().expect("utf-8");
    let format = ["format", "--data", data, "--wal", "4MiB", "--json"];
    assert_eq!(json(&run(&format))["wal_bytes"], 4 << 20);
    let again = run(&format);
    assert_eq!(again.status.code(), Some(1), "it holds a volume");
    assert!(String::from_utf8_lossy(&again.stderr).contains("volume"), "it says what it holds");
    json(&run(&[&format[..], &["--force"]].concat()));
    json(&run(&["verify", "--data", data, "--json"]));
    for part in ["superblock", "wal", "manifest"] {
        json(&run(&["inspect", part, "--data", data, "--json"]));
    }
}

#[test]
fn verify_finds_a_flipped_bit_and_says_where() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let store = mainstay::Store::builder().wal_bytes(8 << 20).memory_bytes(32 << 20).open(&path).expect("opens");
    let data = store.keyspace("data").expect("made");
    let mut batch = mainstay::Batch::new();
    for number in 0..5_000u32 {
        batch.insert(&data, number.to_be_bytes(), vec![number as u8; 100]);
    }
    store.commit(batch).expect("written");
    store.close().expect("flushes and closes");
    drop((data, store));
    let path = path.to_str().expect("utf-8");
    let sound = json(&run(&["verify", "--data", path, "--json"]));
    assert_eq!(sound["sound"], true);
    assert!(sound["tables"].as_u64() > Some(0), "a close flushes: {sound}");
    let manifest = json(&run(&["inspect", "manifest", "--data", path, "--json"]));
    let table = &manifest[0]["tables"][0];
    let id = table["id"].as_str().expect("an id");
    json(&run(&["inspect", "table", id, "--data", path, "--json"]));

    let at = table["extents"][0]["first_unit"].as_u64().expect("a place") * (64 << 10) + 1000;
    let file = std::fs::File::options().read(true).write(true).open(format!("{path}/extents")).expect("there");
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut byte, at).expect("read");
    std::os::unix::fs::FileExt::write_all_at(&file, &[byte[0] ^ 4], at).expect("flipped");
    drop(file);
    let output = run(&["verify", "--data", path, "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["sound"], false);
    assert_eq!(report["damage"][0]["part"], format!("table {id}"), "{report}");
    assert_eq!(run(&["inspect", "table", id, "--data", path]).status.code(), Some(1));
}
