//! Reads everything back through every replica and holds it against what was acknowledged.

use std::collections::BTreeMap;

use indicatif::ProgressBar;
use tonic::Request;
use tonic::metadata::MetadataValue;

use super::cluster::Cluster;
use crate::cli::Failure;
use crate::client::refused;
use crate::etcd::BRANCH_KEY;

use crate::proto::etcdserverpb::RangeRequest;
use crate::proto::etcdserverpb::kv_client::KvClient;
use crate::proto::mainstay::v1 as pb;

/// Name of the clone.
pub(super) const CLONE: &str = "demo-clone";
/// Pairs of one answer.
const PAGE: i64 = 2_000;
/// Complaints that are told one by one.
const COMPLAINTS_MAX: usize = 10;

/// What was found.
#[derive(Default)]
pub(super) struct Checked {
    /// Acknowledged writes that a replica does not have, or has with another value.
    pub(super) lost: u64,
    /// What did not hold, the first few.
    pub(super) complaints: Vec<String>,
}

impl Checked {
    fn complain(&mut self, complaint: String) {
        if self.complaints.len() < COMPLAINTS_MAX {
            self.complaints.push(complaint);
        }
    }
}

/// Reads the store and the clone through each replica, from its own state after a barrier.
pub(super) async fn all(
    cluster: &Cluster,
    expected: &BTreeMap<String, Vec<u8>>,
    clone_changes: &[(String, Vec<u8>)],
    bar: &ProgressBar,
) -> Result<Checked, Failure> {
    let mut in_clone = expected.clone();
    in_clone.extend(clone_changes.iter().cloned());
    let mut checked = Checked::default();
    for at in 0..cluster.len() {
        let mut store = cluster.store_client(at).await?;
        let barrier = pb::BarrierRequest { level: pb::ReadLevel::Linearizable.into(), ..Default::default() };
        store.barrier(barrier).await.map_err(refused)?;
        let mut kv = KvClient::new(cluster.channel(at).await?).max_decoding_message_size(64 << 20);

        let found = read_all(&mut kv, None, bar).await?;
        compare(&format!("{} in the store", cluster.name(at)), expected, &found, &mut checked);
        let found = read_all(&mut kv, Some(CLONE), bar).await?;
        compare(&format!("{} in the clone", cluster.name(at)), &in_clone, &found, &mut checked);
    }
    Ok(checked)
}

type Kv = KvClient<tonic::transport::Channel>;

/// All pairs of a replica's own state, page by page.
async fn read_all(
    kv: &mut Kv,
    clone: Option<&'static str>,
    bar: &ProgressBar,
) -> Result<BTreeMap<String, Vec<u8>>, Failure> {
    let mut found = BTreeMap::new();
    let mut from = vec![0];
    loop {
        let mut request = Request::new(RangeRequest {
            key: from.clone().into(),
            range_end: vec![0].into(),
            limit: PAGE,
            serializable: true,
            ..RangeRequest::default()
        });
        if let Some(clone) = clone {
            request.metadata_mut().insert(BRANCH_KEY, MetadataValue::from_static(clone));
        }
        let answer = kv.range(request).await.map_err(refused)?.into_inner();
        bar.inc(answer.kvs.len() as u64);
        if let Some(last) = answer.kvs.last() {
            from = [&last.key[..], &[0]].concat();
        }
        let more = answer.more && !answer.kvs.is_empty();
        for pair in answer.kvs {
            found.insert(String::from_utf8_lossy(&pair.key).into_owned(), pair.value.to_vec());
        }
        if !more {
            return Ok(found);
        }
    }
}

fn compare(
    place: &str,
    expected: &BTreeMap<String, Vec<u8>>,
    found: &BTreeMap<String, Vec<u8>>,
    checked: &mut Checked,
) {
    for (key, value) in expected {
        match found.get(key) {
            Some(there) if there == value => {}
            Some(_) => {
                checked.lost += 1;
                checked.complain(format!("{place}: another value key={key}"));
            }
            None => {
                checked.lost += 1;
                checked.complain(format!("{place}: not there key={key}"));
            }
        }
    }
    for key in found.keys().filter(|key| !expected.contains_key(*key)) {
        checked.complain(format!("{place}: nobody wrote it key={key}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, Vec<u8>> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), value.as_bytes().to_vec())).collect()
    }

    #[test]
    fn a_missing_a_changed_and_a_strange_pair_are_told_apart() {
        let mut checked = Checked::default();
        compare("x", &map(&[("a", "1"), ("b", "2")]), &map(&[("a", "1"), ("b", "2")]), &mut checked);
        assert_eq!((checked.lost, checked.complaints.len()), (0, 0));
        compare("x", &map(&[("a", "1"), ("b", "2")]), &map(&[("a", "3"), ("c", "4")]), &mut checked);
        assert_eq!(checked.lost, 2);
        assert_eq!(checked.complaints, ["x: another value key=a", "x: not there key=b", "x: nobody wrote it key=c"]);
    }
}
