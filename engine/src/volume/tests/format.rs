//! Ties docs/format.md to the code.

use super::*;
use crate::volume::superblock::VOLUME_FORMAT_VERSION;

#[test]
fn the_document_has_the_fields_of_the_code() {
    let text = include_str!("../../../../docs/format.md");
    let section = text.split("\n## ").find(|s| s.starts_with("Superblock")).expect("the section exists");
    crate::volume::superblock::layout().iter().for_each(|(offset, bytes, name)| {
        let row = format!("| {offset} | {bytes} | {name} |");
        assert!(section.contains(&row), "docs/format.md lacks: {row}");
    });
    for fact in [
        format!("version {VOLUME_FORMAT_VERSION}, or {VOLUME_FORMAT_VERSION_NOTES} "),
        format!("at most {NOTE_BYTES_MAX} bytes"),
        format!("{} copies", COPIES),
        format!("every {} bytes", crate::volume::superblock::COPY_STRIDE_BYTES),
        format!("at most {ROOT_EXTENTS_MAX}"),
        format!("{EXTENT_UNIT_BYTES} bytes"),
        format!("`{}`", String::from_utf8_lossy(&crate::volume::superblock::MAGIC)),
    ] {
        assert!(section.contains(&fact), "docs/format.md lacks: {fact}");
    }
}
