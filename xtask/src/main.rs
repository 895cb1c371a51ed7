//! The commands of the workspace: `ci`, `test`, `sim` and `tidy`.
//!
//! # Place
//! beside the product: it runs cargo and tools, and links nothing of the workspace
//! # Invariants
//! - 1. A step that cannot run says so in the summary; nothing is skipped in silence.
//! - 2. The last line is `N passed, N failed`, and the exit status is 0 only if nothing failed.

#![forbid(unsafe_code)]

mod fuzz;
mod report;
mod setup;
mod tidy;

use std::env;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread::available_parallelism;

use report::{Report, Tally};

const USAGE: &str = "\
usage: cargo xtask COMMAND
  ci          fmt, clippy, docs and tidy with warnings denied, then everything of `test`
  test        installs what the tests need (as root), then runs every test
  sim ARGS    runs the simulator; `cargo xtask sim --help` lists its arguments. With --soak it is built for long runs
  upgrade [COMMIT]
              builds the server of an earlier commit, and has processes of both builds make one cluster, go back, and finalize
  tidy        layers, module headers, file lengths, links in docs, words that do not belong here
";

/// Seeds of the simulation in `test`; each runs twice, one seed on each processor at a time.
const SIM_SEEDS: &str = "200";
/// Single faults on disks in `test`, each alone and healed before the next.
const SINGLE_FAULTS: &str = "1000";
/// Seeds with disks that lie: some must fail, or the simulation sees nothing.
const LYING_SEEDS: &str = "16";
/// The last commit whose server reads the first version of a cluster alone.
const EARLIER: &str = "5e3e9c2";
/// What compiles planted bugs in.
const MUTANTS_FLAG: &str = "--cfg mainstay_mutants";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let root = root();
    env::set_current_dir(&root).expect("the workspace exists: cargo has just built this from it");
    match args.first().map(String::as_str) {
        Some("ci") => {
            let mut report = Report::new();
            lints(&mut report);
            tests(&mut report, &root);
            report.finish()
        }
        Some("test") => {
            let mut report = Report::new();
            tests(&mut report, &root);
            report.finish()
        }
        Some("tidy") => {
            let mut report = Report::new();
            report.check("tidy", || tidy::check(&root));
            report.finish()
        }
        Some("sim") => sim(&args[1..]),
        Some("upgrade") => match upgrade(&root, args.get(1).map_or(EARLIER, String::as_str)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("{e}");
                ExitCode::FAILURE
            }
        },
        _ => {
            eprint!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// The folder of the workspace: the parent of this package.
fn root() -> PathBuf {
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()));
    package.parent().map(Path::to_path_buf).unwrap_or(package)
}

fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args);
    command
}

fn sim_command(profile: &str) -> Command {
    cargo(&["run", "--quiet", "--profile", profile, "--package", "mainstay-sim", "--bin", "mainstay-sim", "--"])
}

/// The simulator with the switch for planted bugs, in a target folder of its own: everything is compiled with it.
fn mutants_command() -> Command {
    let mut command = cargo(&["run", "--quiet", "--profile", "sim", "--target-dir", "target/mutants"]);
    command.args(["--package", "mainstay-sim", "--bin", "mainstay-sim", "--"]);
    command.env("RUSTFLAGS", MUTANTS_FLAG);
    command
}

/// Builds the server of `commit` from the history of this repository, apart from it, and runs the tests of clusters of two builds.
fn upgrade(root: &Path, commit: &str) -> Result<(), String> {
    let folder = root.join("target/earlier").join(commit);
    std::fs::create_dir_all(&folder)
        .map_err(|e| format!("no folder for the earlier build path={}: {e}", folder.display()))?;
    let archive = folder.with_extension("tar");
    let done = |what: &str, command: &mut Command| match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{what} failed: {status}")),
        Err(e) => Err(format!("{what} did not start: {e}")),
    };
    done("git archive", Command::new("git").args(["archive", "--output"]).arg(&archive).arg(commit))?;
    done("tar", Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(&folder))?;
    let target = root.join("target/earlier/target");
    let mut build = cargo(&["build", "--package", "mainstay-server", "--bin", "mainstay", "--target-dir"]);
    done("the earlier build", build.arg(&target).current_dir(&folder))?;
    let mut test =
        cargo(&["nextest", "run", "--package", "mainstay-tests", "--test", "upgrade", "--run-ignored", "all"]);
    done("the test", test.env("EARLIER_BUILD", target.join("debug/mainstay")))
}

/// No build without debug assertions may have planted bugs: one that asks for them does not compile.
fn release_refuses_mutants() -> Result<(), String> {
    let mut command = cargo(&["check", "--quiet", "--release", "--target-dir", "target/mutants"]);
    command.args(["--package", "mainstay-io"]).env("RUSTFLAGS", MUTANTS_FLAG);
    let output = command.output().map_err(|e| format!("cargo did not start: {e}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() && said.contains("planted bugs are for the simulator alone") {
        return Ok(());
    }
    Err(format!("a release build with planted bugs was not refused: {said}"))
}

fn sim(args: &[String]) -> ExitCode {
    let soak = args.iter().any(|arg| arg == "--soak");
    let mut command = sim_command(if soak { "soak" } else { "sim" });
    if args.iter().any(|arg| arg == "--mutants" || arg == "--mutant") {
        if let Err(e) = release_refuses_mutants() {
            eprintln!("{e}");
            return ExitCode::FAILURE;
        }
        command = mutants_command();
    }
    match command.args(args.iter().filter(|arg| *arg != "--soak")).status() {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(status) => ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
        Err(e) => {
            eprintln!("cargo did not start: {e}");
            ExitCode::FAILURE
        }
    }
}

fn lints(report: &mut Report) {
    report.run("fmt", cargo(&["fmt", "--all", "--check"]));
    report.run("clippy", cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]));
    let mut doc = cargo(&["doc", "--workspace", "--no-deps"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    report.run("doc", doc);
    report.check("tidy", || tidy::check(&root()));
}

fn tests(report: &mut Report, root: &Path) {
    setup::install(report, root);
    if setup::cargo_has("nextest") {
        // Most tests wait for clocks more than for a processor.
        let threads = (available_parallelism().map_or(1, NonZero::get) * 3).div_ceil(2).to_string();
        let mut tests = cargo(&["nextest", "run", "--workspace", "--no-fail-fast", "--test-threads", &threads]);
        // It builds every target before it runs a test, the server among them.
        tests.env("SERVER_BINARY_IS_BUILT", "1");
        report.count("tests", tests, Tally::Nextest);
    } else {
        report.note("cargo-nextest is not installed: tests run with cargo test");
        report.count(
            "tests",
            cargo(&["test", "--workspace", "--no-fail-fast", "--lib", "--bins", "--tests"]),
            Tally::Libtest,
        );
    }
    report.count("doc tests", cargo(&["test", "--workspace", "--no-fail-fast", "--doc"]), Tally::Libtest);
    let mut sim = sim_command("sim");
    sim.args(["--seeds", SIM_SEEDS, "--twice"]);
    report.count("simulation", sim, Tally::Seeds);
    let mut single = sim_command("sim");
    single.args(["--single-faults", SINGLE_FAULTS]);
    report.count("simulation of single faults", single, Tally::Seeds);
    let mut lying = sim_command("sim");
    lying.args(["--seeds", LYING_SEEDS, "--lying-disks"]);
    report.count("simulation finds lies", lying, Tally::Seeds);
    hook(report, root, "C binding", "bindings/c/test.sh");
    hook(report, root, "deploy", "deploy/check.sh");
    fuzz::run(report, root);
}

/// Runs a script of another part, if that part has one.
fn hook(report: &mut Report, root: &Path, name: &str, script: &str) {
    if root.join(script).is_file() {
        let mut command = Command::new("bash");
        command.arg(script);
        if let Some(path) = setup::path_with_tools(root) {
            command.env("PATH", path);
        }
        report.run(name, command);
    } else {
        report.note(format!("{name}: there is no {script}"));
    }
}
