//! Runs every fuzz target for a while, from its seeds.
//!
//! # Place
//! called by `test`; the targets are a workspace of their own in `fuzz/`, since they need a nightly compiler
//! # Invariants
//! - 1. A run never writes into `fuzz/corpus/`: what it finds goes below `target/`, where the next run begins from it.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::report::Report;
use crate::setup;

/// Seconds of each target.
const SECONDS: &str = "20";
/// Seconds that one input may take before it counts as a hang.
const INPUT_SECONDS_MAX: &str = "10";

/// Builds all targets once, then runs as many at a time as there are cores.
pub(crate) fn run(report: &mut Report, root: &Path) {
    if !setup::has_nightly() {
        report.note("fuzz: did not run, it needs a nightly compiler: `rustup toolchain install nightly`");
        return;
    }
    if !setup::cargo_has("fuzz") {
        let mut install = Command::new("cargo");
        install.args(["install", "--quiet", "--locked", "cargo-fuzz"]);
        if !report.run("install cargo-fuzz", install) {
            return;
        }
    }
    let targets = match cargo_fuzz(root, &["list"]).output() {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).into_owned(),
        Ok(output) => return report.fail("fuzz list", &String::from_utf8_lossy(&output.stderr)),
        Err(e) => return report.fail("fuzz list", &e.to_string()),
    };
    if !report.run("fuzz build", cargo_fuzz(root, &["build"])) {
        return;
    }
    let mut runs = Vec::new();
    for target in targets.split_whitespace() {
        // The first folder takes what the run finds, the second is only read.
        let found = root.join("target/fuzz-corpus").join(target);
        let seeds = root.join("fuzz/corpus").join(target);
        if let Err(e) = fs::create_dir_all(&found) {
            return report.fail(&format!("fuzz {target}"), &e.to_string());
        }
        if fs::read_dir(&seeds).map_or(true, |mut entries| entries.next().is_none()) {
            report.fail(
                &format!("fuzz {target}"),
                "there are no seeds; `cargo run --example seeds` in fuzz/ writes them",
            );
            continue;
        }
        let mut command = cargo_fuzz(root, &["run", target]);
        command.arg(found).arg(seeds).arg("--").args([
            format!("-max_total_time={SECONDS}"),
            format!("-timeout={INPUT_SECONDS_MAX}"),
            "-verbosity=0".into(),
            "-print_final_stats=1".into(),
        ]);
        runs.push((format!("fuzz {target}"), command));
    }
    report.run_side_by_side(runs);
}

fn cargo_fuzz(root: &Path, args: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.arg("+nightly").arg("fuzz").args(args).current_dir(root);
    // Set by the cargo that runs us, and stronger than `+nightly`.
    command.env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
    command
}
