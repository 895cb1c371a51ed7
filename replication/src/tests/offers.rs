//! A leader that offers a snapshot, over a transport whose answers the test gives one by one.

use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use mainstay_engine::LogIndex;
use openraft::errors::StreamingError;
use openraft::network::RaftNetworkV2;

use super::pipeline::{Config, Held, option, run};
use crate::network::{OFFER_BYTES_PER_SECOND, OFFER_TIMEOUT, method, read_await_snapshot, write_installed};
use crate::state_machine::{Exported, SnapshotHandle};
use crate::types::{RaftSnapshot, SnapshotMeta, Vote, log_id};
use crate::wire::encode_result;
use crate::{Envelope, ErrorKind};

/// Longer than a second of a slow link.
const MANIFEST_BYTES: u64 = 3 * OFFER_BYTES_PER_SECOND;

fn snapshot() -> RaftSnapshot {
    let manifest = Bytes::from(vec![1; MANIFEST_BYTES as usize]);
    let meta = SnapshotMeta { last_log_id: Some(log_id(3, 9)), ..SnapshotMeta::default() };
    let export = Exported { flushed: LogIndex(9), manifest, _pin: None };
    RaftSnapshot { meta, snapshot: SnapshotHandle::Local(export) }
}

fn vote() -> Vote {
    Vote::new_committed(3, 1)
}

fn answer(held: &Held, i: usize, installed: Option<Vote>) {
    let body = encode_result(Ok(installed), write_installed);
    held.take(i).answer.send(Ok(Envelope { method: 0, body })).expect("it is waited for");
}

/// A replica stood still for 15 seconds after the offer that a partition had swallowed.
#[test]
fn an_offer_that_is_lost_is_given_up_in_the_time_that_its_bytes_need() {
    run(async |held, mut network| {
        let cancel = std::future::pending();
        let mut offer =
            Box::pin(RaftNetworkV2::<Config>::full_snapshot(&mut network, vote(), snapshot(), cancel, option()));
        assert!(offer.as_mut().now_or_never().is_none(), "it waits for the peer");
        assert_eq!(held.sent(), 1);
        let call = held.take(0);
        assert_eq!(call.request.method, method::SNAPSHOT);
        assert_eq!(call.timeout, Duration::from_secs(3) + OFFER_TIMEOUT);
        assert!(OFFER_TIMEOUT <= Duration::from_secs(3), "what nobody works on is offered again soon");
        let lost = crate::Error::new(ErrorKind::Indeterminate, "no answer in time");
        assert!(call.answer.send(Err(lost)).is_ok());
        let given_up = offer.await.expect_err("nobody has answered");
        assert!(matches!(given_up, StreamingError::Unreachable(_)), "{given_up}");
    });
}

#[test]
fn who_installs_a_snapshot_is_asked_again_without_its_manifest() {
    run(async |held, mut network| {
        let cancel = std::future::pending();
        let mut offer =
            Box::pin(RaftNetworkV2::<Config>::full_snapshot(&mut network, vote(), snapshot(), cancel, option()));
        for asked in 0..3 {
            assert!(offer.as_mut().now_or_never().is_none(), "it waits for the peer");
            assert_eq!(held.sent(), asked + 1);
            answer(&held, asked, None);
        }
        assert!(offer.as_mut().now_or_never().is_none(), "it waits for the peer");
        let call = held.take(3);
        assert_eq!((call.request.method, call.timeout), (method::AWAIT_SNAPSHOT, OFFER_TIMEOUT));
        assert_eq!(read_await_snapshot(&call.request.body).expect("ours"), (vote(), Some(log_id(3, 9))));
        let body = encode_result(Ok(Some(vote())), write_installed);
        assert!(call.answer.send(Ok(Envelope { method: 0, body })).is_ok());
        assert_eq!(offer.await.expect("installed").vote, vote());
    });
}

/// It was started again, and has forgotten.
#[test]
fn who_does_not_know_of_an_install_is_offered_the_snapshot_again() {
    run(async |held, mut network| {
        let cancel = std::future::pending();
        let mut offer =
            Box::pin(RaftNetworkV2::<Config>::full_snapshot(&mut network, vote(), snapshot(), cancel, option()));
        assert!(offer.as_mut().now_or_never().is_none(), "it waits for the peer");
        answer(&held, 0, None);
        assert!(offer.as_mut().now_or_never().is_none(), "it waits for the peer");
        held.fail(1, ErrorKind::Unavailable);
        let given_up = offer.await.expect_err("the install is gone");
        assert!(matches!(given_up, StreamingError::Unreachable(_)), "{given_up}");
    });
}
