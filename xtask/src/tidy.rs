//! Checks of the tree that no compiler makes: layers, module headers, lengths, links, words.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Lines that a source file may have.
const LINES_MAX: usize = 1_200;

/// Our packages from the bottom up. A package may depend on those below it; those of one rank do not know each other.
/// docs/architecture.md draws the same.
const RANKS: &[(&str, u32)] = &[
    ("mainstay-io", 0),
    ("mainstay-memtree", 0),
    ("mainstay-wal", 1),
    ("mainstay-engine", 2),
    ("mainstay-replication", 3),
    ("mainstay", 4),
    ("mainstay-sim", 5),
    ("mainstay-server", 5),
    ("mainstay-c", 5),
    ("mainstay-tests", 6),
    ("xtask", 7),
];

/// The table of what is taken from elsewhere, and the manifests that must agree with it.
const DEPENDENCIES: &str = "docs/dependencies.md";
const WORKSPACES: &[&str] = &["Cargo.toml", "benches/Cargo.toml", "fuzz/Cargo.toml"];

/// Only the replication crate knows that openraft exists, only io knows the kernel.
const ONLY_IN: &[(&str, &[&str])] = &[
    ("openraft", &["mainstay-replication"]),
    ("openraft-rt", &["mainstay-replication", "mainstay-sim"]),
    ("openraft-rt-tokio", &["mainstay-replication"]),
    ("io-uring", &["mainstay-io"]),
];

/// Words that tie the tree to one machine or one mirror, in two halves so that this list does not find itself.
const WORDS: &[(&str, &str)] = &[
    ("/wo", "rk/"),
    ("/ro", "ot/"),
    ("index.cra", "tes.io"),
    ("static.cra", "tes.io"),
    ("py", "pi.org"),
    ("deb.deb", "ian.org"),
    ("proxy.gol", "ang.org"),
    ("registry.npm", "js"),
];

/// Runs every check and returns the problems as `path:line: what`.
pub(crate) fn check(root: &Path) -> Result<(), Vec<String>> {
    let mut problems = Vec::new();
    match files(root) {
        Ok(files) => {
            for file in &files {
                check_file(root, file, &mut problems);
            }
        }
        Err(e) => problems.push(format!("git ls-files: {e}")),
    }
    match metadata(root, "Cargo.toml") {
        Ok(metadata) => layers(&metadata, &mut problems),
        Err(e) => problems.push(format!("cargo metadata: {e}")),
    }
    dependencies(root, &mut problems);
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// What git knows or would add: nothing below `target/`.
fn files(root: &Path) -> Result<Vec<PathBuf>, String> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .map_err(|e| e.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let unique: BTreeSet<PathBuf> = String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect();
    Ok(unique.into_iter().filter(|path| root.join(path).is_file()).collect())
}

fn check_file(root: &Path, file: &Path, problems: &mut Vec<String>) {
    let Ok(text) = fs::read_to_string(root.join(file)) else { return };
    let at = file.display();
    match file.extension().and_then(|e| e.to_str()) {
        Some("rs") => {
            let count = text.lines().count();
            if count > LINES_MAX {
                problems.push(format!("{at}: {count} lines, at most {LINES_MAX}"));
            }
            if !text.trim_start().starts_with("//!") {
                problems.push(format!("{at}:1: a module begins with `//!` and says what it is for"));
            }
        }
        Some("md") => links(root, file, &text, problems),
        _ => {}
    }
    if file.file_name().is_some_and(|name| name == "Cargo.lock") {
        return;
    }
    for (number, line) in text.lines().enumerate() {
        for (a, b) in WORDS {
            if line.contains(&format!("{a}{b}")) {
                problems.push(format!("{at}:{}: `{a}{b}` ties the tree to one machine", number + 1));
            }
        }
    }
}

/// Every relative link of a page leads to a file, and to a heading of it if it names one.
fn links(root: &Path, file: &Path, text: &str, problems: &mut Vec<String>) {
    let mut fenced = false;
    for (number, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        for target in targets(line) {
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            if target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            let folder = root.join(file);
            let folder = folder.parent().unwrap_or(root);
            let whole = if path.is_empty() { root.join(file) } else { folder.join(path) };
            if !whole.exists() {
                problems.push(format!("{}:{}: link to `{target}`: there is no such file", file.display(), number + 1));
            } else if !anchor.is_empty() && whole.extension().is_some_and(|e| e == "md") {
                let page = fs::read_to_string(&whole).unwrap_or_default();
                if !headings(&page).contains(anchor) {
                    problems.push(format!("{}:{}: link to `{target}`: no such heading", file.display(), number + 1));
                }
            }
        }
    }
}

/// The targets of the links in one line: what stands between `](` and `)`.
fn targets(line: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some(start) = rest.find("](") {
        rest = &rest[start + 2..];
        let Some(end) = rest.find(')') else { break };
        found.push(rest[..end].split_whitespace().next().unwrap_or_default());
        rest = &rest[end..];
    }
    found
}

/// The anchors of a page, as the usual renderers make them.
fn headings(page: &str) -> BTreeSet<String> {
    page.lines()
        .filter_map(|line| line.strip_prefix('#'))
        .map(|line| {
            line.trim_start_matches('#')
                .trim()
                .chars()
                .filter_map(|c| match c {
                    ' ' => Some('-'),
                    '-' | '_' => Some(c),
                    c if c.is_alphanumeric() => Some(c.to_ascii_lowercase()),
                    _ => None,
                })
                .collect()
        })
        .collect()
}

fn metadata(root: &Path, manifest: &str) -> Result<Value, String> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path", manifest])
        .current_dir(root)
        .output()
        .map_err(|e| e.to_string())?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())
}

/// Every crate that a manifest of the tree names has a row in the table, and every row is still needed.
fn dependencies(root: &Path, problems: &mut Vec<String>) {
    let mut needed = BTreeMap::new();
    for manifest in WORKSPACES {
        match metadata(root, manifest) {
            Ok(metadata) => crates(&metadata, &mut needed),
            Err(e) => problems.push(format!("cargo metadata of {manifest}: {e}")),
        }
    }
    match fs::read_to_string(root.join(DEPENDENCIES)) {
        Ok(page) => compare(&needed, &rows(&page), problems),
        Err(e) => problems.push(format!("{DEPENDENCIES}: {e}")),
    }
}

/// The crates from elsewhere that the packages name, each with one package that does.
fn crates(metadata: &Value, needed: &mut BTreeMap<String, String>) {
    let empty = Vec::new();
    for package in metadata["packages"].as_array().unwrap_or(&empty) {
        let by = package["name"].as_str().unwrap_or_default();
        for dependency in package["dependencies"].as_array().unwrap_or(&empty) {
            if dependency["path"].is_null() {
                let name = dependency["name"].as_str().unwrap_or_default();
                needed.entry(name.to_owned()).or_insert_with(|| by.to_owned());
            }
        }
    }
}

/// The names in the first column of the table.
fn rows(page: &str) -> BTreeSet<String> {
    page.lines()
        .filter_map(|line| line.strip_prefix('|')?.split('|').next())
        .flat_map(|cell| cell.split(','))
        .map(|name| name.trim().to_owned())
        .filter(|name| name != "crate" && !name.starts_with("---"))
        .collect()
}

fn compare(needed: &BTreeMap<String, String>, rows: &BTreeSet<String>, problems: &mut Vec<String>) {
    for (name, by) in needed {
        if !rows.contains(name) {
            problems.push(format!("{DEPENDENCIES}: no row for {name}, which {by} depends on"));
        }
    }
    for name in rows {
        if !needed.contains_key(name) {
            problems.push(format!("{DEPENDENCIES}: a row for {name}, which nothing depends on"));
        }
    }
}

/// No arrow between our packages turns back. Development dependencies may: a test is nobody's foundation.
fn layers(metadata: &Value, problems: &mut Vec<String>) {
    let ranks: BTreeMap<&str, u32> = RANKS.iter().copied().collect();
    let empty = Vec::new();
    for package in metadata["packages"].as_array().unwrap_or(&empty) {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(rank) = ranks.get(name) else {
            problems.push(format!("{name}: has no rank; give it one here and in docs/architecture.md"));
            continue;
        };
        for dependency in package["dependencies"].as_array().unwrap_or(&empty) {
            let on = dependency["name"].as_str().unwrap_or_default();
            if dependency["kind"].as_str() == Some("dev") {
                continue;
            }
            if ranks.get(on).is_some_and(|below| below >= rank) {
                problems.push(format!("{name}: depends on {on}, which is not below it"));
            }
            if ONLY_IN.iter().any(|(krate, owners)| *krate == on && !owners.contains(&name)) {
                problems.push(format!("{name}: depends on {on}, which it must not know"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_is_tidy_enough_to_be_read() {
        assert_eq!(targets("see [a](b.md#c) and [d](e)."), ["b.md#c", "e"]);
        assert!(headings("# A word\n## Fault model, in short").contains("fault-model-in-short"));
    }

    #[test]
    fn a_dependency_that_turns_back_is_found() {
        let metadata = serde_json::json!({ "packages": [
            { "name": "mainstay-wal", "dependencies": [{ "name": "mainstay-engine", "kind": null }] },
            { "name": "mainstay-engine", "dependencies": [{ "name": "mainstay-wal", "kind": null },
                { "name": "mainstay-sim", "kind": "dev" }, { "name": "openraft", "kind": null }] },
        ]});
        let mut problems = Vec::new();
        layers(&metadata, &mut problems);
        assert_eq!(problems.len(), 2, "{problems:?}");
    }
    #[test]
    fn a_crate_without_a_row_and_a_row_without_a_crate_are_found() {
        let metadata = serde_json::json!({ "packages": [{ "name": "mainstay-io", "dependencies": [
            { "name": "bytes", "path": null }, { "name": "libc" }, { "name": "mainstay-wal", "path": "wal" },
        ]}]});
        let mut needed = BTreeMap::new();
        crates(&metadata, &mut needed);
        let mut problems = Vec::new();
        compare(&needed, &rows("text\n| crate | why |\n|---|---|\n| bytes, rand | shared |\n"), &mut problems);
        assert_eq!(
            problems,
            [
                "docs/dependencies.md: no row for libc, which mainstay-io depends on",
                "docs/dependencies.md: a row for rand, which nothing depends on",
            ]
        );
    }
}
