//! Entry points for the fuzz targets and benches of this workspace.
//!
//! No part of the interface: it changes with the code behind it.

/// Decoders: any bytes in, no panic.
pub mod fuzz {
    use bytes::Bytes;

    use crate::batch::{HEADER_BYTES, Header, MAGIC, RECORD_HEADER_BYTES, take_record, take_records};
    use crate::{GroupId, Lsn, Record, RecordKind};

    /// Takes `bytes` as a batch: as it is, and with checksums made right, so that what lies behind them is reached.
    pub fn batch(bytes: &[u8]) {
        walk(bytes);
        let mut sealed = bytes.to_vec();
        if sealed.len() < HEADER_BYTES {
            return;
        }
        sealed[..MAGIC.len()].copy_from_slice(&MAGIC);
        let checksum = crc_fast::crc64_nvme(&sealed[..HEADER_BYTES - 8]);
        sealed[HEADER_BYTES - 8..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
        let lsn = Header::decode(&sealed).map_or(Lsn(0), |header| header.lsn);
        let mut at = HEADER_BYTES;
        while let Some(record) = sealed.get_mut(at..).filter(|rest| rest.len() >= RECORD_HEADER_BYTES) {
            let length = u32::from_le_bytes([record[8], record[9], record[10], record[11]]) as usize;
            let Some(covered) = record.get(8..length.saturating_add(RECORD_HEADER_BYTES)) else { break };
            let checksum = crc_fast::crc64_nvme(covered) ^ lsn.0;
            record[..8].copy_from_slice(&checksum.to_le_bytes());
            at += RECORD_HEADER_BYTES + length;
        }
        walk(&sealed);
    }

    fn walk(bytes: &[u8]) {
        let _ = take_record(bytes, Lsn(0), 0);
        let Some(header) = Header::decode(bytes) else { return };
        let _ = header.body_matches(bytes);
        let Some(records) = take_records(&header, bytes) else { return };
        for record in records {
            let from = record.pos.offset as usize + RECORD_HEADER_BYTES;
            assert!(bytes.get(from..from + record.pos.length as usize).is_some(), "a record lies within its batch");
        }
    }

    /// A batch of two records.
    pub fn batch_seed() -> Vec<u8> {
        super::bench::encode(&[b"first".as_slice(), b"second record"].map(|payload| Record {
            group: GroupId(1),
            kind: RecordKind(RecordKind::OWNER_FIRST),
            payload: vec![Bytes::from_static(payload)],
        }))
    }
}

/// The hot pieces one by one.
pub mod bench {
    use crate::batch::{HEADER_BYTES, Header, RECORD_HEADER_BYTES, WAL_FORMAT_VERSION, padded, put_record};
    use crate::{Lsn, Record};

    /// Encodes a batch of records and seals it.
    pub fn encode(records: &[Record]) -> Vec<u8> {
        let lengths: Vec<usize> =
            records.iter().map(|record| record.payload.iter().map(|part| part.len()).sum()).collect();
        let filled: usize = lengths.iter().map(|length| length + RECORD_HEADER_BYTES).sum();
        let mut batch = vec![0; padded((HEADER_BYTES + filled) as u64) as usize];
        let mut at = HEADER_BYTES;
        for (record, length) in records.iter().zip(lengths) {
            at = put_record(&mut batch, at, Lsn(0), record, length);
        }
        let mut header = Header {
            version: WAL_FORMAT_VERSION,
            records: records.len() as u32,
            volume: [7; 16],
            epoch: 1,
            lsn: Lsn(0),
            follows: Lsn(0),
            durable: Lsn(0),
            chain: 0,
            batch_bytes: batch.len() as u32,
            payload_bytes: filled as u32,
            body_checksum: 0,
            checksum: 0,
        };
        header.seal(&mut batch);
        batch
    }
}
