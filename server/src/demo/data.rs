//! A real, ordered data set that every machine with Rust has: the paths and sizes below the cargo registry and the toolchain.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Up to `most` pairs of path and size in order of paths, at least `least`: where a machine has fewer files, numbered keys
/// fill up.
pub(super) fn collect(least: usize, most: usize) -> Vec<(String, Vec<u8>)> {
    let mut pairs = Vec::new();
    for root in roots() {
        walk(&root, most, &mut pairs);
    }
    for number in pairs.len()..least {
        let key = format!("synthetic/{:03}/{:03}/{number:09}", number % 997, number % 101);
        pairs.push((key, format!("{}", number.wrapping_mul(2_654_435_761) % 1_000_003).into_bytes()));
    }
    pairs.sort();
    pairs.dedup_by(|a, b| a.0 == b.0);
    pairs
}

fn roots() -> Vec<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output().ok();
    let sysroot = sysroot.and_then(|output| String::from_utf8(output.stdout).ok()).map(|path| path.trim().into());
    home.map(|home| home.join("registry")).into_iter().chain(sysroot).collect()
}

/// Depth first, without following links; what cannot be read is left out.
fn walk(root: &Path, most: usize, pairs: &mut Vec<(String, Vec<u8>)>) {
    let mut waiting = vec![root.to_path_buf()];
    while let Some(folder) = waiting.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                waiting.push(entry.path());
            }
            if pairs.len() == most {
                return;
            }
            let key = format!("files{}", entry.path().display());
            pairs.push((key, metadata.len().to_string().into_bytes()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_data_set_is_ordered_without_doubles_and_within_its_bounds() {
        let pairs = collect(500, 700);
        assert!((500..=700).contains(&pairs.len()), "{}", pairs.len());
        assert!(pairs.windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(pairs.iter().all(|(key, value)| !key.is_empty() && !value.is_empty()));
    }
}
