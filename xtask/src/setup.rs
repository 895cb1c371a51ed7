//! Installs the tools that the tests call, where it may, and says what is missing where it may not.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::report::Report;

/// A program that some test starts, and the Debian package that has it.
struct Tool {
    program: &'static str,
    package: &'static str,
    needed_by: &'static str,
    /// Needed only if this path of the workspace exists.
    only_with: Option<&'static str>,
}

const TOOLS: &[Tool] = &[
    Tool { program: "cc", package: "gcc", needed_by: "the C binding", only_with: None },
    Tool {
        program: "valgrind",
        package: "valgrind",
        needed_by: "the C binding",
        only_with: Some("bindings/c/test.sh"),
    },
    Tool { program: "losetup", package: "util-linux", needed_by: "volumes on block devices", only_with: None },
    Tool { program: "mkfs.ext4", package: "e2fsprogs", needed_by: "full file systems", only_with: None },
    Tool { program: "tc", package: "iproute2", needed_by: "partitions of real processes", only_with: None },
    Tool { program: "nbdkit", package: "nbdkit", needed_by: "devices with errors", only_with: None },
    Tool { program: "nbdfuse", package: "libnbd-bin", needed_by: "devices with errors", only_with: None },
    Tool { program: "fusermount3", package: "fuse3", needed_by: "devices with errors", only_with: None },
    Tool { program: "etcdctl", package: "etcd-client", needed_by: "the etcd API", only_with: None },
    Tool { program: "python3", package: "python3", needed_by: "deploy checks", only_with: Some("deploy") },
];

/// Installs what is missing. What could not be installed is a failed step as root and a note for others.
pub(crate) fn install(report: &mut Report, root: &Path) {
    let missing: Vec<&Tool> = TOOLS
        .iter()
        .filter(|tool| tool.only_with.is_none_or(|path| root.join(path).exists()) && !on_path(tool.program))
        .collect();
    let mut packages: Vec<&str> = missing.iter().map(|tool| tool.package).collect();
    let deploy = root.join("deploy").is_dir() && !root.join(VALIDATE).exists();
    if deploy && !has_venv() {
        packages.push("python3-venv");
    }
    packages.sort_unstable();
    packages.dedup();
    if !packages.is_empty() {
        if is_root() && on_path("apt-get") {
            // The list of packages of a fresh machine is empty or old: without the update the install fails.
            let mut update = Command::new("apt-get");
            update.args(["update", "--quiet"]);
            report.run("apt-get update", update);
            let mut install = Command::new("apt-get");
            install.args(["install", "--yes", "--quiet", "--no-install-recommends"]).args(&packages);
            install.env("DEBIAN_FRONTEND", "noninteractive");
            report.run("apt-get install", install);
        } else {
            for tool in missing {
                report.note(format!("{} is missing, needed by {}", tool.program, tool.needed_by));
            }
            report.note(format!("install them with: apt-get update && apt-get install {}", packages.join(" ")));
        }
    }
    if deploy {
        let mut venv = Command::new("python3");
        venv.args(["-m", "venv", "target/tools/venv"]);
        report.run("python environment", venv);
        let mut pip = Command::new("target/tools/venv/bin/pip");
        pip.args(["install", "--quiet", "--disable-pip-version-check", "kubernetes-validate"]);
        report.run("pip install kubernetes-validate", pip);
    }
}

const VALIDATE: &str = "target/tools/venv/bin/kubernetes-validate";

/// `PATH` with the tools that were installed below `target/` first.
pub(crate) fn path_with_tools(root: &Path) -> Option<OsString> {
    let mut paths = vec![root.join("target/tools/venv/bin")];
    paths.extend(env::split_paths(&env::var_os("PATH")?));
    env::join_paths(paths).ok()
}

/// True if cargo has the subcommand.
pub(crate) fn cargo_has(subcommand: &str) -> bool {
    on_path(&format!("cargo-{subcommand}"))
        || home_bin().is_some_and(|bin| bin.join(format!("cargo-{subcommand}")).is_file())
}

/// True if rustup has a nightly toolchain.
pub(crate) fn has_nightly() -> bool {
    Command::new("rustup")
        .args(["toolchain", "list"])
        .output()
        .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).lines().any(|line| line.starts_with("nightly")))
}

fn home_bin() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
        .map(|home| home.join("bin"))
}

fn on_path(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    env::split_paths(&path).chain(system).any(|folder| folder.join(program).is_file())
}

fn has_venv() -> bool {
    Command::new("python3")
        .args(["-c", "import ensurepip"])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}
