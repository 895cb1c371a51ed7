//! How much memory the cgroup of the process allows, and how much of it the store takes when nobody says.
//!
//! # Place
//! `settings` asks at start; `serve` goes on asking, so that a limit that is changed under a running process is followed
//! # Why not
//! Watching the files for changes: the kernel tells nothing of them for a limit, and one read in a while costs nothing.

use std::time::Duration;

use mainstay::Node;

/// The part of the limit that is for the store, one in so many. The rest is for bodies of requests, connections, stacks and the program.
const SHARE: u64 = 2;
/// The least that a store works with.
pub(crate) const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// The most that the setting takes.
pub(crate) const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// Between two looks at the limit.
const LOOK_PAUSE: Duration = Duration::from_secs(5);
/// From here on a limit is none: version 1 writes a number near 2^63.
const UNLIMITED: u64 = 1 << 60;
/// Where the kernel shows its control groups.
const ROOT: &str = "/sys/fs/cgroup";

/// What the store takes of what the cgroup allows; the default of the library where there is no limit.
pub(crate) fn memory_bytes_default(read: &dyn Fn(&str) -> Option<String>) -> u64 {
    let share = |limit: u64| (limit / SHARE).clamp(MEMORY_BYTES_MIN, MEMORY_BYTES_MAX);
    limit(read).map_or(mainstay::MEMORY_BYTES_DEFAULT, share)
}

/// The file as text.
pub(crate) fn read_file(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// The lowest limit of the groups that the process is in, of version 2, or of version 1 where that holds the memory. A container that sees
/// itself at the root has its limit there.
fn limit(read: &dyn Fn(&str) -> Option<String>) -> Option<u64> {
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let mut files = vec![format!("{ROOT}/memory.max"), format!("{ROOT}/memory/memory.limit_in_bytes")];
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (below, file) = match controllers {
            "" => ("", "memory.max"),
            _ if controllers.split(',').any(|controller| controller == "memory") => {
                ("/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        // Each one above bounds those below.
        let mut path = path.trim_end_matches('/');
        while !path.is_empty() {
            files.push(format!("{ROOT}{below}{path}/{file}"));
            path = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        }
    }
    let limits = files.iter().filter_map(|file| read(file)?.trim().parse::<u64>().ok());
    limits.filter(|limit| *limit < UNLIMITED).min()
}

/// Gives the store its share of the limit of now, and again whenever that has changed.
pub(crate) async fn follow_limit(node: Node, mut given: u64) {
    let mut looks = tokio::time::interval(LOOK_PAUSE);
    loop {
        looks.tick().await;
        let bytes = memory_bytes_default(&read_file);
        if bytes != given {
            tracing::info!(
                from = given,
                to = bytes,
                "the limit of the cgroup was changed: the memory of the store follows"
            );
            node.engine().set_memory_bytes(bytes);
            given = bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_above_the_process_counts() {
        const MIB: u64 = 1 << 20;
        let check = |files: &[(&str, &str)], expect: Option<u64>| {
            let read = |path: &str| files.iter().find(|(name, _)| *name == path).map(|(_, text)| (*text).to_owned());
            assert_eq!(limit(&read), expect, "{files:?}");
        };
        let of_process = |text| ("/proc/self/cgroup", text);
        check(&[], None);
        // A container of version 2: it is at the root of what it sees.
        check(&[of_process("0::/\n"), ("/sys/fs/cgroup/memory.max", "104857600\n")], Some(100 * MIB));
        check(&[of_process("0::/\n"), ("/sys/fs/cgroup/memory.max", "max\n")], None);
        // A service of a machine: the slice above it is narrower.
        check(
            &[
                of_process("0::/system.slice/mainstay.service\n"),
                ("/sys/fs/cgroup/system.slice/memory.max", "52428800\n"),
                ("/sys/fs/cgroup/system.slice/mainstay.service/memory.max", "104857600\n"),
            ],
            Some(50 * MIB),
        );
        // Version 1, with a path that the container does not see, and without a limit.
        let of_v1 = of_process("11:cpu,cpuacct:/docker/7\n9:memory:/docker/7\n");
        check(&[of_v1, ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "104857600\n")], Some(100 * MIB));
        check(&[of_v1, ("/sys/fs/cgroup/memory/docker/7/memory.limit_in_bytes", "52428800\n")], Some(50 * MIB));
        check(&[of_v1, ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")], None);
        check(&[of_process("no such line"), ("/sys/fs/cgroup/memory.max", "no number")], None);
    }

    #[test]
    fn the_store_takes_half_within_its_bounds() {
        let with = |limit: &'static str| {
            memory_bytes_default(&move |path| (path == "/sys/fs/cgroup/memory.max").then(|| limit.to_owned()))
        };
        assert_eq!(with("1073741824"), 512 << 20);
        assert_eq!(with("1048576"), MEMORY_BYTES_MIN);
        assert_eq!(with("576460752303423488"), MEMORY_BYTES_MAX);
        assert_eq!(with("max"), mainstay::MEMORY_BYTES_DEFAULT);
    }
}
