//! Runs a part of a test in a process of its own, where a filter, a limit or a signal does no harm to the others.
//!
//! The child is this test binary once more, told by an environment variable which part to run.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

const PART: &str = "MAINSTAY_IO_TEST_PART";
const PLACE: &str = "MAINSTAY_IO_TEST_PLACE";

/// Which part this process shall run, and where; `None` in the process that the test runner started.
pub(crate) fn part() -> Option<(String, std::path::PathBuf)> {
    Some((std::env::var(PART).ok()?, std::env::var_os(PLACE)?.into()))
}

/// Runs `part` of the test `entry` in a child and gives its standard output.
pub(crate) fn run(entry: &str, part: &str, place: &std::path::Path, as_nobody: bool) -> String {
    let mut program = std::env::current_exe().expect("this binary");
    let private = tempfile::tempdir().expect("a directory");
    let nobody = as_nobody && rustix::process::getuid().is_root();
    if nobody {
        // Where it was built others may have no way to: a clone in a folder of root's own.
        let copy = private.path().join("test");
        std::fs::copy(program, &copy).expect("this binary can be copied");
        for path in [private.path(), place] {
            std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).expect("root may give away");
        }
        program = copy;
    }
    let mut command = Command::new(program);
    command.args([entry, "--exact", "--nocapture", "--test-threads=1"]).env(PART, part).env(PLACE, place);
    if nobody {
        command.uid(NOBODY).gid(NOBODY);
    }
    let Output { status, stdout, stderr } = command.output().expect("the child starts");
    let (stdout, stderr) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "part {part} failed: {status}\n{stdout}\n{stderr}");
    stdout.into_owned()
}

const NOBODY: u32 = 65534;

/// Lets the system calls `numbers` answer `errno` from now on.
pub(crate) fn refuse(numbers: &[i64], errno: i32, all_threads: bool) {
    let rules: BTreeMap<_, _> = numbers.iter().map(|number| (*number, Vec::new())).collect();
    let arch = std::env::consts::ARCH.try_into().expect("an architecture with seccomp");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(errno as u32), arch);
    let program: BpfProgram = filter.expect("a filter").try_into().expect("a program");
    let applied =
        if all_threads { seccompiler::apply_filter_all_threads(&program) } else { seccompiler::apply_filter(&program) };
    applied.expect("any process may give up system calls");
}
