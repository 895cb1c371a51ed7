//! How long a device is waited for.
//!
//! # Place
//! between the tests and the device: whatever the command asks of one is waited for here
//! # Invariants
//! 1. A device that stops answering ends the test that asked it, by name, [`ANSWER_MAX`] after the question.
//! # Why not
//! A sleep for each operation: each would stay with the clock to its end, and its beginning would be in the latencies that are measured. One
//! serves all operations that are answered before it ends.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Either, select};
use mainstay_io::{BoxFuture, Clock, block_on};

/// How long a device may take for an operation.
pub(super) const ANSWER_MAX: Duration = Duration::from_secs(60);

/// Waits for a device, and not for ever.
pub(super) struct Patience {
    clock: Arc<dyn Clock>,
    /// From an operation that was answered in time.
    sleep: Option<BoxFuture<()>>,
}

impl Patience {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, sleep: None }
    }

    /// Waits for an answer in `test`.
    pub(super) fn wait<T>(&mut self, test: &str, operation: impl Future<Output = T>) -> Result<T, String> {
        self.wait_beyond(Duration::ZERO, test, operation)
    }

    /// Waits for an answer that is due after `time`.
    pub(super) fn wait_beyond<T>(
        &mut self,
        time: Duration,
        test: &str,
        operation: impl Future<Output = T>,
    ) -> Result<T, String> {
        let end = self.clock.now() + time + ANSWER_MAX;
        let mut operation = pin!(operation);
        block_on(async {
            loop {
                let left = end.saturating_sub(self.clock.now());
                let sleep = self.sleep.get_or_insert_with(|| self.clock.sleep(left));
                match select(operation.as_mut(), sleep).await {
                    Either::Left((answer, _)) => return Ok(answer),
                    Either::Right(((), _)) => self.sleep = None,
                }
                if self.clock.now() >= end {
                    return Err(format!("no answer within {ANSWER_MAX:?}: {test}"));
                }
            }
        })
    }
}
