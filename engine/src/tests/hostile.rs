//! Bytes of any content where edits, pages and exports are expected: a typed error or a value, never a panic.

use bytes::Bytes;
use mainstay_io::{BoxFuture, block_on};
use mainstay_wal::GroupId;
use proptest::prelude::*;

use super::harness::*;
use crate::engine::decode_pages;
use crate::group::Recovered;
use crate::{CommandBody, Error, ErrorKind, MAIN, Result, TableId, TableSource};

fn is_typed(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Foreign)
}

/// Has no table to give.
struct Nothing;

impl TableSource for Nothing {
    fn read_table(&self, id: TableId, _: u64, _: u64) -> BoxFuture<Result<Bytes>> {
        Box::pin(std::future::ready(Err(Error::new(ErrorKind::NotFound, format!("no such table table={id}")))))
    }
}

proptest! {
    #[test]
    fn edits_and_pages_of_any_bytes_are_refused_or_read(
        mut bytes in prop::collection::vec(any::<u8>(), 2..200),
        settings in any::<bool>(),
        version in 1u8..=2,
    ) {
        bytes[0] = version;
        bytes[1] = settings.into();
        let bytes = Bytes::from(bytes);
        let mut known = None;
        if let Err(error) = Recovered::apply_edit(&mut known, GroupId(1), bytes.clone()) {
            prop_assert!(is_typed(&error), "{error}");
        }
        // And once more on top of what it made.
        let _ = Recovered::apply_edit(&mut known, GroupId(1), bytes.clone());
        if let Err(error) = decode_pages(bytes) {
            prop_assert!(is_typed(&error), "{error}");
        }
    }
}

/// Every byte of a real export changed in turn: an import answers, and what it took goes on applying.
#[test]
fn a_damaged_export_never_panics() {
    let from = media();
    let store = Store::open(&from);
    for n in 0..40 {
        store.put(&format!("k{n:02}"), &[n; 90]);
    }
    store.must(CommandBody::CreateCheckpoint { name: "c".into(), branch: MAIN });
    let export = store.group().export().expect("the group is open");
    let to = media();
    let (engine, _) = engine(&to, engine_settings()).expect("opens");
    let group = block_on(engine.group(GROUP, settings())).expect("opens");
    let mut refused = 0;
    for at in 0..export.manifest.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = export.manifest.to_vec();
            bytes[at] ^= flip;
            refused += usize::from(block_on(group.import(bytes.into(), &Nothing)).is_err());
        }
        let cut = export.manifest.slice(..at);
        assert!(block_on(group.import(cut, &Nothing)).is_err(), "cut at {at}");
    }
    assert!(refused > 0);
    store.close();
}
