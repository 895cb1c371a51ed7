//! Ties docs/format.md to the constants of the code.

use crate::{KEY_BYTES_MAX, VALUE_BYTES_MAX};

fn section(title: &str) -> &'static str {
    let text = include_str!("../../../docs/format.md");
    let section = text.split("\n## ").find(|s| s.starts_with(&format!("{title}\n")));
    section.unwrap_or_else(|| panic!("docs/format.md lacks the section {title}"))
}

fn check(title: &str, facts: &[String]) {
    for fact in facts {
        assert!(section(title).contains(fact), "docs/format.md, section {title}, lacks: {fact}");
    }
}

#[test]
fn the_document_has_the_versions_kinds_and_bounds_of_the_code() {
    check(
        "Commands",
        &[
            format!("| 0 | 1 | version | {};", crate::command::COMMAND_VERSION),
            format!("1 to {} long", crate::codec::NAME_BYTES_MAX),
            format!("1 to {KEY_BYTES_MAX} bytes, a value 0 to {VALUE_BYTES_MAX}"),
            format!("at most {};", crate::codec::ROOT_BYTES_MAX),
            format!("The start has 1 to {} bytes", crate::range_tombstone::BOUND_BYTES_MAX),
        ],
    );
    for (kind, name) in crate::command::KINDS {
        check("Commands", &[format!("| {kind} | {name} |")]);
    }
    for (kind, name) in crate::command::OP_KINDS {
        check("Commands", &[format!("{kind} {name}: bytes")]);
    }
    for (kind, name) in crate::condition::CONDITION_KINDS {
        check("Commands", &[format!("| {kind} {name} |")]);
    }
    check(
        "Outcomes",
        &[
            format!("`{}`", crate::OUTCOMES_KEYSPACE),
            format!("modulo {},", crate::outcome::OUTCOMES_KEPT),
            format!("| 0 | 1 | version | {};", crate::outcome::VERSION),
        ],
    );
    for (kind, name) in crate::outcome::KINDS {
        check("Outcomes", &[format!("{kind} {name}")]);
    }
    check(
        "Entries of a local log",
        &[
            format!("kind {} ", crate::local_log::LOCAL_ENTRY.0),
            format!("| 0 | 8 | term | {};", crate::local_log::LOCAL_TERM),
            format!("| {} | rest | command |", crate::local_log::ENTRY_HEADER_BYTES),
        ],
    );
    check(
        "Manifest",
        &[
            format!("| version | {}, or", crate::manifest::MANIFEST_VERSION_SHAPED),
            format!("`tables` {};", crate::manifest::MANIFEST_VERSION),
            format!("; {} where a compaction was asked for", crate::manifest::MANIFEST_VERSION_MANUAL),
            format!("or {} when a table has range tombstones", crate::manifest::MANIFEST_VERSION_PARTS),
            format!("{} levels", crate::manifest::LEVELS),
        ],
    );
    check(
        "Manifest edits",
        &[
            format!("Records of kind {}:", crate::group::MANIFEST_EDIT.0),
            format!("| version | u8 | {}, or {} with", crate::group::EDIT_VERSION, crate::group::EDIT_VERSION_SHAPED),
            format!("; {} when a table that it installs", crate::group::EDIT_VERSION_RANGED),
            format!("; {} when it names a merge operator", crate::group::EDIT_VERSION_OPERATORS),
            format!("; {} when it makes an expiring keyspace", crate::group::EDIT_VERSION_EXPIRING),
            format!("; {} when it gives a keyspace options", crate::group::EDIT_VERSION_PARTS),
        ],
    );
    for (kind, name) in crate::manifest::OP_KINDS {
        check("Manifest edits", &[format!("| {kind} | {name} |")]);
    }
    check("Manifest pages", &[format!("a u8 version ({};", crate::engine::PAGES_VERSION)]);
    check("Exports", &[format!("a u8 version ({};", crate::group::EXPORT_VERSION)]);
}
