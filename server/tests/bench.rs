//! `mainstay bench` as an operator runs it: every workload against a server and against the library, what it prints, what it refuses.

mod process;

use std::collections::BTreeSet;
use std::path::Path;

use process::{LoopDevice, Ports, Server, json, run};

/// Small, and looked at.
const SMALL: [&str; 11] =
    ["bench", "--json", "--verify", "--keys", "60", "--ops", "200", "--clients", "4", "--value", "64"];

/// Workload, kinds of operations, whether records are loaded first.
const WORKLOADS: [(&str, &[&str], bool); 13] = [
    ("put", &["update"], false),
    ("get", &["read"], false),
    ("mixed", &["read", "update"], false),
    ("a", &["read", "update"], true),
    ("b", &["read", "update"], true),
    ("c", &["read"], true),
    ("d", &["insert", "read"], true),
    ("e", &["insert", "scan"], true),
    ("f", &["read", "read-modify-write"], true),
    ("fill", &["insert"], false),
    ("overwrite", &["update"], true),
    ("read", &["read"], true),
    ("scan", &["scan"], true),
];

/// Every workload through `at`, its figures and its promises.
fn every_workload(at: &[&str], through: &str) {
    for (workload, kinds, loaded) in WORKLOADS {
        let found = json(&run(&[&SMALL[..], &["--workload", workload], at].concat()));
        let context = || format!("{workload}: {found:#}");
        let ops = if workload == "fill" { 60 } else { 200 };
        assert_eq!((&found["ops"], &found["errors"]), (&ops.into(), &0.into()), "{}", context());
        assert_eq!((&found["workload"], &found["through"]), (&workload.into(), &through.into()), "{}", context());
        assert_eq!(
            (&found["records"], &found["seed"], &found["rate"]),
            (&60.into(), &1.into(), &serde_json::Value::Null)
        );
        assert_eq!(found["load"]["records"].as_u64(), loaded.then_some(60), "{}", context());
        let rows = found["operations"].as_array().expect("a list");
        let names: BTreeSet<&str> = rows.iter().map(|row| row["operation"].as_str().expect("a name")).collect();
        assert_eq!(names, kinds.iter().copied().collect(), "{}", context());
        assert_eq!(rows.iter().map(|row| row["ops"].as_u64().expect("a count")).sum::<u64>(), ops, "{}", context());
        for row in rows.iter().chain([&found]) {
            let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key} is missing: {row:#}"));
            let order = ["p50_ms", "p90_ms", "p99_ms", "p999_ms", "p9999_ms"].map(number);
            assert!(order.is_sorted() && number("p9999_ms") <= number("max_ms") * 1.001, "{row:#}");
            assert!(number("mean_ms") > 0.0 && number("ops_per_second") > 0.0, "{row:#}");
        }
        for row in rows {
            let writes = row["operation"] != "read" && row["operation"] != "scan";
            assert_eq!(row["durability"].as_str(), writes.then_some("default"), "{row:#}");
            assert!(row["curve"].as_array().is_some_and(|curve| curve.len() > 4), "{row:#}");
        }
        let in_time = found["intervals"].as_array().expect("a list");
        assert!(in_time.iter().any(|interval| interval["ops_per_second"].as_f64() > Some(0.0)), "{}", context());
        let verified = &found["verified"];
        assert_eq!((&verified["missing"], &verified["wrong"], &verified["unread"]), (&0.into(), &0.into(), &0.into()));
        let written = loaded || kinds.iter().any(|kind| *kind == "update" || *kind == "insert");
        assert_eq!(verified["after"].as_u64() > Some(0), written, "{}", context());
        let read = kinds.iter().any(|kind| *kind != "update" && *kind != "insert");
        assert_eq!(verified["during"].as_u64() > Some(0), read, "{}", context());
    }
}

#[test]
fn a_server_is_measured_by_every_workload() {
    let folder = tempfile::tempdir().expect("a folder");
    let ports = Ports::free();
    let server = Server::start("a", &folder.path().join("a"), &ports, "");
    json(&run(&["init", "--members", "a", "--admin", ports.admin(), "--json"]));
    let at = ["--endpoints", ports.client()];
    every_workload(&at, "served");

    // Of several durabilities each has figures of its own, and what was acknowledged before it was committed is read back as well.
    let several = ["--workload", "a", "--durability", "local,quorum,all"];
    let found = json(&run(&[&SMALL[..], &several, &at].concat()));
    let rows = found["operations"].as_array().expect("a list").iter();
    let names: Vec<_> = rows.map(|row| (row["operation"].as_str(), row["durability"].as_str())).collect();
    let update = |level| (Some("update"), Some(level));
    assert_eq!(names, [(Some("read"), None), update("local"), update("quorum"), update("all")], "{found:#}");
    assert_eq!(found["verified"]["wrong"], 0, "{found:#}");

    // At a rate everything that was due is accounted for.
    let rate = ["--workload", "mixed", "--rate", "400", "--duration", "500ms", "--clients", "4", "--keys", "60"];
    let found = json(&run(&[&["bench", "--json"], &rate[..], &at].concat()));
    let count = |key: &str| found[key].as_u64().expect("a count");
    assert_eq!(count("ops") + count("errors") + count("not_begun"), 200, "{found:#}");
    assert_eq!(found["rate"], 400);

    // Reads of an earlier run's records.
    let again = ["--workload", "read", "--no-load"];
    let found = json(&run(&[&SMALL[..], &again, &at].concat()));
    assert_eq!((&found["load"], &found["verified"]["during"]), (&serde_json::Value::Null, &200.into()), "{found:#}");
    server.stop();
}

#[test]
fn the_library_is_measured_by_every_workload() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let at = ["--embedded", path.to_str().expect("utf-8"), "--memory", "32MiB", "--wal", "8MiB"];
    every_workload(&at, "embedded");
    let other = ["--workload", "a", "--threads", "2", "--durability", "quorum", "--distribution", "latest"];
    let found = json(&run(&[&SMALL[..], &other, &at].concat()));
    assert_eq!((&found["distribution"], &found["operations"][1]["durability"]), (&"latest".into(), &"quorum".into()));
    json(&run(&["verify", "--data", at[1], "--json"]));
}

/// The keys that a run left in its store.
fn keys(path: &Path) -> BTreeSet<Vec<u8>> {
    let store = mainstay::Store::builder().memory_bytes(32 << 20).open(path).expect("opens");
    let keys = store.keyspace("bench").expect("there").iter().map(|entry| entry.expect("read").key.to_vec()).collect();
    store.close().expect("closed");
    keys
}

#[test]
fn the_same_seed_does_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let done = |name: &str, seed: &str| {
        let path = folder.path().join(name);
        let args = [
            "bench",
            "--json",
            "--workload",
            "put",
            "--keys",
            "1000",
            "--ops",
            "300",
            "--clients",
            "3",
            "--seed",
            seed,
        ];
        let at = ["--embedded", path.to_str().expect("utf-8"), "--memory", "32MiB", "--wal", "8MiB"];
        assert_eq!(json(&run(&[&args[..], &at].concat()))["seed"].to_string(), seed);
        keys(&path)
    };
    let first = done("first", "5");
    assert_eq!(first, done("again", "5"));
    assert_ne!(first, done("other", "6"));
}

#[test]
fn text_and_page_say_what_the_document_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("store");
    let page = folder.path().join("page.html");
    let args =
        ["bench", "--workload", "a", "--keys", "60", "--ops", "200", "--clients", "4", "--value", "64", "--verify"];
    let at = ["--memory", "32MiB", "--wal", "8MiB", "--embedded", path.to_str().expect("utf-8")];
    let output = run(&[&args[..], &at, &["--html", page.to_str().expect("utf-8")]].concat());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text} {}", String::from_utf8_lossy(&output.stderr));
    for part in [
        "loaded 60 records",
        "a with 4 clients and 64 byte values: 200 ops",
        "p99.99",
        "read ",
        "update ",
        "0 missing, 0 wrong",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let page = std::fs::read_to_string(&page).expect("written");
    assert!(page.starts_with("<!DOCTYPE html>") && page.matches("<svg ").count() == 3, "{page}");
    assert!(["http:", "https:", "src=", "<script"].iter().all(|part| !page.contains(part)), "it loads nothing");
    let refused = run(&[&args[..], &at, &["--html", "/nowhere/page.html"]].concat());
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("/nowhere/page.html"));
    assert!(String::from_utf8_lossy(&refused.stdout).contains("200 ops"), "the figures are not lost with the page");
}

#[test]
fn wrong_calls_exit_with_two_and_failures_with_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("utf-8");
    let check = |args: &[&str], status: i32, says: &str| {
        let output = run(&[&["bench"], args].concat());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {text}");
        assert!(text.contains(says), "{args:?} should say '{says}': {text}");
    };
    check(&["--workload", "g"], 2, "--workload");
    check(&["--distribution", "normal"], 2, "--distribution");
    check(&["--durability", "local,sometimes"], 2, "sometimes");
    check(&["--rate", "0"], 2, "--rate");
    check(&["--keys", "0"], 2, "--keys");
    check(&["--verify", "--value", "23"], 2, "at least 24 bytes");
    check(&["--value", "17MiB"], 2, "16 MiB");
    check(&["--memory", "32MiB"], 2, "--embedded");
    check(&["--embedded", path, "--connections", "3"], 2, "--connections");
    check(&["--endpoints", ","], 2, "no endpoint");
    check(&["--endpoints", "127.0.0.1:1", "--ops", "1"], 1, "127.0.0.1:1");
    let file = folder.path().join("file");
    std::fs::write(&file, "kept").expect("written");
    check(&["--embedded", file.to_str().expect("utf-8"), "--ops", "1"], 1, "not a directory");
    assert_eq!(std::fs::read(&file).expect("there"), b"kept");
    let Some(device) = LoopDevice::over(&folder.path().join("image"), 48 << 20) else { return };
    check(&["--embedded", device.0.to_str().expect("utf-8"), "--ops", "1"], 2, "takes a directory");
    let image = std::fs::read(folder.path().join("image")).expect("read");
    assert!(image.iter().all(|byte| *byte == 0), "nothing was laid out on it");
}
