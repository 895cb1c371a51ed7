//! Requests of a peer that are begun in the order in which they arrived.
//!
//! # Place
//! `service` takes a [`Turn`] for each append of a stream; a transport hands requests over in the order of its
//! connection and then lets them run beside each other
//! # Invariants
//! - T1. A request begins when the one before it of the same peer has begun or was given up. It does not wait for the
//!   end of that one.

use std::collections::BTreeMap;
use std::sync::Mutex;

use tokio::sync::oneshot;

/// Peers whose last turn is remembered. Beyond it all are forgotten, which lets one request begin too early.
const PEERS_MAX: usize = 256;

/// The last turn that each peer took.
#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<BTreeMap<u64, oneshot::Receiver<()>>>);

/// A place in the order of a peer's requests. Dropping it lets the next one begin.
#[derive(Debug)]
pub(crate) struct Turn {
    before: Option<oneshot::Receiver<()>>,
    _next: oneshot::Sender<()>,
}

impl Turns {
    /// The place behind all that `peer` has taken so far.
    pub(crate) fn take(&self, peer: u64) -> Turn {
        let (next, receiver) = oneshot::channel();
        let mut last = self.0.lock().expect("nothing panics while it holds this lock");
        if last.len() >= PEERS_MAX && !last.contains_key(&peer) {
            last.clear();
        }
        Turn { before: last.insert(peer, receiver), _next: next }
    }
}

impl Turn {
    /// Waits until the request before has begun. Cancel safe.
    pub(crate) async fn wait(&mut self) {
        if let Some(before) = &mut self.before {
            // Nothing is ever sent: the other end was dropped.
            let _ = before.await;
            self.before = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn each_begins_when_the_one_before_has_begun() {
        let turns = Turns::default();
        let (mut a, mut b, mut c) = (turns.take(1), turns.take(1), turns.take(1));
        let mut other = turns.take(2);
        assert!(a.wait().now_or_never().is_some(), "the first waits for nothing");
        assert!(other.wait().now_or_never().is_some(), "peers do not wait for each other");
        assert!(b.wait().now_or_never().is_none());
        drop(a);
        assert!(c.wait().now_or_never().is_none(), "the one before has not begun");
        assert!(b.wait().now_or_never().is_some());
        // Given up by its caller: nobody waits for it.
        drop(b);
        assert!(c.wait().now_or_never().is_some());
    }
}
