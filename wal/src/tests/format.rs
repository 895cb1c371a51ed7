//! Ties docs/format.md to the code, and feeds the decoder what nobody wrote.

use proptest::prelude::*;

use super::*;
use crate::batch::{self, Header, MAGIC, take_record, take_records};

#[test]
fn the_document_has_the_fields_of_the_code() {
    let text = include_str!("../../../docs/format.md");
    let section = text.split("\n## ").find(|s| s.starts_with("Write-ahead log")).expect("the section exists");
    for (offset, bytes, name) in batch::layout().concat() {
        let row = format!("| {offset} | {bytes} | {name} |");
        assert!(section.contains(&row), "docs/format.md lacks: {row}");
    }
    for fact in [
        format!("version {}", crate::WAL_FORMAT_VERSION),
        format!("`{}`", String::from_utf8_lossy(&MAGIC)),
        format!("header ({})", batch::HEADER_BYTES),
        format!("0 to {}", crate::RECORD_BYTES_MAX),
        format!("Up to {} batches", crate::IN_FLIGHT_MAX_LIMIT),
        format!("{} bytes from the\ndurable", crate::ring::IN_FLIGHT_SPAN_MAX),
        format!("below {} of the engine", RecordKind::OWNER_FIRST),
    ] {
        assert!(section.contains(&fact), "docs/format.md lacks: {fact}");
    }
}

/// The very bytes of a batch of version 1: a change of the format must not go unseen.
#[test]
fn a_batch_of_version_one_has_these_bytes() {
    let bench = Bench::blank(MIB);
    bench.commit(b"payload").expect("commits");
    let batch = bench.device.image()[..4096].to_vec();
    assert_eq!(&batch[..8], b"MNSTWALB");
    assert_eq!(batch[8..16], [1, 0, 96, 0, 1, 0, 0, 0]);
    assert_eq!(batch[16..32], VOLUME);
    assert_eq!(batch[32..40], 1_u64.to_le_bytes());
    assert_eq!(batch[40..72], [0; 32]);
    assert_eq!(batch[72..80], [0, 16, 0, 0, 31, 0, 0, 0]);
    assert_eq!(batch[104..120], [7, 0, 0, 0, 32, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(&batch[120..127], b"payload");
    assert!(batch[127..].iter().all(|&b| b == 0));
    assert_eq!(crc_fast::crc64_nvme(&batch[..88]).to_le_bytes(), batch[88..96]);
    assert_eq!(crc_fast::crc64_nvme(&batch[96..]).to_le_bytes(), batch[80..88]);
    assert_eq!(crc_fast::crc64_nvme(&batch[104..127]).to_le_bytes(), batch[96..104]);
    assert_eq!(crc_fast::crc64_nvme(b"123456789"), 0xAE8B_1486_0A79_9888, "the checksum is CRC-64/NVME");
}

/// A record is bound to its batch's position: the same bytes one lap later are another record.
#[test]
fn a_record_of_an_earlier_lap_does_not_verify() {
    let bench = Bench::blank(MIB);
    let pos = bench.commit(b"payload").expect("commits");
    let image = bench.device.image();
    let bytes = &image[pos.offset as usize..];
    assert!(take_record(bytes, pos.batch, pos.offset).is_some());
    assert!(take_record(bytes, Lsn(pos.batch.0 + MIB as u64), pos.offset).is_none());
}

proptest! {
    /// Whatever bytes: an answer, never a panic, and no record that reaches out of them.
    #[test]
    fn no_bytes_make_the_decoder_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..300),
        magic in any::<bool>(),
        sums in any::<bool>(),
        lsn in any::<u64>(),
    ) {
        if magic && bytes.len() >= 8 {
            bytes[..8].copy_from_slice(&MAGIC);
        }
        if sums && bytes.len() >= 96 {
            let sum = crc_fast::crc64_nvme(&bytes[..88]);
            bytes[88..96].copy_from_slice(&sum.to_le_bytes());
        }
        if let Some(header) = Header::decode(&bytes) {
            let _ = header.body_matches(&bytes);
            let _ = take_records(&header, &bytes);
        }
        if let Some(record) = take_record(&bytes, Lsn(lsn), 96) {
            prop_assert!(record.pos.length as usize + 24 <= bytes.len());
        }
    }

    /// A flipped bit anywhere in the records of a batch is found.
    #[test]
    fn a_flipped_bit_is_found(at in 0_usize..4096, bit in 0_u8..8) {
        let bench = Bench::blank(MIB);
        bench.commit(&payload(3, 3000)).expect("commits");
        let mut batch = bench.device.image()[..4096].to_vec();
        batch[at] ^= 1 << bit;
        let whole = Header::decode(&batch).is_some_and(|header| header.body_matches(&batch));
        prop_assert!(!whole);
    }
}
