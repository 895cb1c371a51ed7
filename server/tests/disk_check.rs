//! `mainstay disk-check` as an operator runs it: what it prints, what it refuses, and that it leaves nothing behind.

mod process;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use process::{LoopDevice, mainstay, run};

const SMALL: [&str; 4] = ["--seconds", "1", "--size", "8MiB"];

fn check(path: &Path, args: &[&str]) -> Output {
    let path = path.to_str().expect("utf-8");
    run(&[&["disk-check", path], &SMALL[..], args].concat())
}

/// The document, which is printed whatever the verdict is; the exit status follows the verdict.
fn document(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stderr);
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {text}"));
    let expect = if document["verdict"] == "fit" { 0 } else { 1 };
    assert_eq!(output.status.code(), Some(expect), "{document:#} {text}");
    document
}

fn names(folder: &Path) -> usize {
    std::fs::read_dir(folder).expect("a folder").count()
}

#[test]
fn a_directory_is_measured_and_left_as_it_was() {
    let folder = tempfile::tempdir().expect("a folder");
    for backend in ["auto", "threads"] {
        let found = document(&check(folder.path(), &["--json", "--backend", backend]));
        assert_eq!(names(folder.path()), 0, "nothing is left");
        assert_eq!(found["target"], "directory");
        assert!(backend == "auto" || found["backend"] == "threads", "{found:#}");
        assert!(found["direct_io"].is_boolean() && found["reasons"].is_array(), "{found:#}");
        for key in ["path", "fallback_reason", "file_system", "device"] {
            assert!(found.get(key).is_some(), "{key} is missing in {found:#}");
        }
        let tests = found["tests"].as_array().expect("a list");
        let shapes: Vec<_> =
            tests.iter().map(|test| (&test["name"], &test["block_bytes"], &test["in_flight"])).collect();
        let expect = [
            ("durable-write", 4096, 1),
            ("durable-write", 65536, 1),
            ("durable-write", 4096, 3),
            ("sequential-write", 1 << 20, 4),
            ("random-read", 4096, 1),
        ];
        let expect = expect.map(|(name, bytes, count)| (name.into(), bytes.into(), count.into()));
        assert_eq!(
            shapes,
            expect.each_ref().map(|(name, bytes, count): &(serde_json::Value, _, _)| (name, bytes, count))
        );
        for test in tests {
            let number = |key: &str| test[key].as_f64().unwrap_or_else(|| panic!("{key} is missing in {test:#}"));
            assert!(number("ops") > 0.0 && number("iops") > 0.0 && number("seconds") > 0.0, "{test:#}");
            let bandwidth = number("iops") * number("block_bytes");
            assert!((number("bytes_per_second") / bandwidth - 1.0).abs() < 1e-6, "{test:#}");
            let order = ["p50_us", "p90_us", "p99_us", "p999_us", "p9999_us"].map(number);
            assert!(order.is_sorted() && number("p9999_us") <= number("max_us") * 1.001, "{test:#}");
            assert!(number("mean_us") > 0.0, "{test:#}");
        }
        assert_eq!(found["flushes"]["durable_writes"], tests[0]["ops"]);
        assert!(found["flushes"]["finding"].is_string(), "{found:#}");
    }
    let output = check(folder.path(), &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for word in ["durable-write", "sequential-write", "random-read", "flushes: ", "O_DIRECT", "p99.9", "IOPS"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let verdict = text.lines().last().and_then(|line| line.strip_prefix("verdict: ")).expect("a verdict");
    assert_eq!(output.status.success(), verdict == "fit", "{text}");
}

#[test]
fn memory_is_no_disk() {
    let memory = Path::new("/dev/shm");
    let Ok(folder) = tempfile::tempdir_in(memory) else {
        return eprintln!("nothing like /dev/shm here: memory is not tested");
    };
    let found = document(&check(folder.path(), &["--json"]));
    if found["file_system"] != "tmpfs" {
        return eprintln!("/dev/shm is no tmpfs here: {}", found["file_system"]);
    }
    assert_eq!(found["verdict"], "unfit");
    assert!(found["reasons"][0].as_str().expect("a reason").contains("in memory"), "{found:#}");
    assert_eq!(names(folder.path()), 0);
}

/// However it ends: a process that is killed cleans nothing up.
#[test]
fn a_killed_check_leaves_nothing_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut process = mainstay()
        .args(["disk-check", "--seconds", "3600", "--size", "8MiB"])
        .arg(folder.path())
        .stdout(Stdio::null())
        .spawn()
        .expect("starts");
    // It measures once it has a file in the folder open, whatever that is called.
    let fds = PathBuf::from(format!("/proc/{}/fd", process.id()));
    let shown = std::fs::canonicalize(folder.path()).expect("there");
    let opened = || {
        let Ok(links) = std::fs::read_dir(&fds) else { return false };
        links.flatten().filter_map(|link| std::fs::read_link(link.path()).ok()).any(|to| to.starts_with(&shown))
    };
    let end = Instant::now() + Duration::from_secs(60);
    while !opened() {
        assert!(Instant::now() < end && process.try_wait().expect("known").is_none(), "it never began");
        std::thread::yield_now();
    }
    process.kill().expect("killed");
    process.wait().expect("ends");
    assert_eq!(names(folder.path()), 0);
}

#[test]
fn a_device_is_written_only_when_that_was_said_and_never_over_a_volume() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(device) = LoopDevice::over(&folder.path().join("image"), 48 << 20) else { return };
    let says = |output: &Output, status: i32, text: &str| {
        let found = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{found}");
        assert!(found.contains(text), "should say '{text}': {found}");
    };
    let image = || std::fs::read(folder.path().join("image")).expect("read");
    says(&check(&device.0, &[]), 2, "--destroy-device");
    assert!(image().iter().all(|byte| *byte == 0), "nothing was written");
    says(
        &run(&["disk-check", device.0.to_str().expect("utf-8"), "--size", "1GiB", "--destroy-device"]),
        2,
        "too small",
    );

    let found = document(&check(&device.0, &["--json", "--destroy-device"]));
    assert_eq!((&found["target"], found["tests"].as_array().map(Vec::len)), (&"device".into(), Some(5)), "{found:#}");
    assert!(found["device"]["name"].as_str().is_some_and(|name| name.starts_with("loop")), "{found:#}");
    let read = std::fs::File::open(&device.0).expect("opened");
    let mut ring = vec![1; 5 << 20];
    std::os::unix::fs::FileExt::read_exact_at(&read, &mut ring, 0).expect("read");
    assert!(
        ring.iter().all(|byte| *byte == 0),
        "the place of the superblock was not written, that of the log is zeroes again"
    );
    drop(read);

    // Somebody has it open.
    let busy = mainstay_io::open_media(&mainstay_io::Target::Device(device.0.clone()), &Default::default());
    says(&check(&device.0, &["--destroy-device"]), 1, "in use");
    for device in busy.expect("opened").devices() {
        device.shutdown(Duration::from_secs(20)).wait().expect("drained");
    }

    let path = device.0.to_str().expect("utf-8");
    let formatted = run(&["format", "--data", path, "--wal", "4MiB"]);
    assert!(formatted.status.success(), "{}", String::from_utf8_lossy(&formatted.stderr));
    let before = image();
    says(&check(&device.0, &["--destroy-device"]), 1, "holds a volume");
    assert!(image() == before, "the volume is as it was");
    assert!(run(&["verify", "--data", path]).status.success());
}

/// A file system that is mounted without barriers answers durable writes and flushes nothing.
#[test]
fn durable_writes_without_a_flush_are_suspect() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(device) = LoopDevice::over(&folder.path().join("image"), 64 << 20) else { return };
    let mount = folder.path().join("mount");
    std::fs::create_dir(&mount).expect("made");
    let done = |name: &str, args: &[&str], paths: &[&Path]| {
        Command::new(name).args(args).args(paths).output().is_ok_and(|output| output.status.success())
    };
    if !done("mkfs.ext4", &["-q", "-F"], &[&device.0]) {
        return eprintln!("no ext4 can be made here: flushes are not counted");
    }
    for (options, finding) in [("noatime", "reached"), ("noatime,barrier=0", "suspect")] {
        if !done("mount", &["-t", "ext4", "-o", options], &[&device.0, &mount]) {
            return eprintln!("no ext4 can be mounted here: flushes are not counted");
        }
        let full = run(&["disk-check", mount.to_str().expect("utf-8"), "--size", "64MiB", "--seconds", "1"]);
        assert_eq!((full.status.code(), full.stdout.len()), (Some(1), 0), "a full file system gives no verdict");
        let output = check(&mount, &["--json"]);
        assert!(done("umount", &[], &[&mount]));
        let found = document(&output);
        assert_eq!(found["file_system"], "ext4");
        if found["device"]["volatile_cache"] != true || found["device"]["fua"] != false {
            return eprintln!("this loop device has no cache to flush: {}", found["device"]);
        }
        assert_eq!(found["flushes"]["finding"], finding, "{options}: {found:#}");
        assert_eq!(
            found["verdict"] == "unfit" && found["reasons"][0].as_str().expect("a reason").starts_with("suspect"),
            finding == "suspect",
            "{found:#}"
        );
    }
}

#[test]
fn wrong_calls_exit_with_two() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().to_str().expect("utf-8");
    let file = folder.path().join("file");
    std::fs::write(&file, "kept").expect("written");
    let check = |args: &[&str], status: i32, says: &str| {
        let output = run(&[&["disk-check"], args].concat());
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {text}");
        assert!(text.contains(says), "{args:?} should say '{says}': {text}");
    };
    check(&[], 2, "<DIR|DEVICE>");
    check(&[path, "--seconds", "0"], 2, "--seconds");
    check(&[path, "--size", "1MiB"], 2, "whole MiB");
    check(&[path, "--size", "8388609"], 2, "whole MiB");
    check(&[path, "--destroy-device"], 2, "a directory keeps what it has");
    check(&[path, "--backend", "fast"], 2, "fast");
    check(&[file.to_str().expect("utf-8")], 2, "neither a directory nor a block device");
    check(&[&format!("{path}/missing")], 2, "No such file");
    assert_eq!(std::fs::read(&file).expect("there"), b"kept");
    assert_eq!(names(folder.path()), 1);
}
