//! What clients were told: which writes were acknowledged, which have an unknown outcome.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// For each key the values in the order in which its one writer tried them, and the last that was acknowledged.
///
/// A key has one writer that has one write in flight, so what a replica may hold is: the last acknowledged value or any
/// tried after it.
#[derive(Debug, Default)]
pub struct Ledger(Mutex<BTreeMap<Vec<u8>, Line>>);

#[derive(Debug, Default)]
struct Line {
    acknowledged: Option<u64>,
    tried: u64,
}

impl Ledger {
    /// The next value for `key`; the caller writes it now.
    pub fn attempt(&self, key: &[u8]) -> u64 {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let line = lines.entry(key.to_vec()).or_default();
        line.tried += 1;
        line.tried
    }

    /// `value` of `key` was acknowledged.
    pub fn acknowledge(&self, key: &[u8], value: u64) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let line = lines.entry(key.to_vec()).or_default();
        line.acknowledged = line.acknowledged.max(Some(value));
    }

    /// How many writes were acknowledged. Each acknowledged value counts the ones before it on its key.
    pub fn acknowledged(&self) -> u64 {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.values().filter_map(|line| line.acknowledged).sum()
    }

    /// The last acknowledged value of each key.
    pub fn acknowledged_values(&self) -> BTreeMap<Vec<u8>, u64> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter_map(|(key, line)| Some((key.clone(), line.acknowledged?))).collect()
    }

    /// Compares what a replica holds with what was acknowledged; returns a line for each key that is wrong.
    pub fn differences(&self, found: &BTreeMap<Vec<u8>, u64>) -> Vec<String> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut wrong = Vec::new();
        for (key, line) in lines.iter() {
            let value = found.get(key).copied();
            let allowed = match (line.acknowledged, value) {
                (None, None) => true,
                (acknowledged, Some(value)) => acknowledged.unwrap_or(1) <= value && value <= line.tried,
                (Some(_), None) => false,
            };
            if !allowed {
                let key = String::from_utf8_lossy(key);
                wrong.push(format!(
                    "key={key} acknowledged={:?} tried={} found={value:?}",
                    line.acknowledged, line.tried
                ));
            }
        }
        wrong.extend(
            found.keys().filter(|key| !lines.contains_key(*key)).map(|key| format!("never written key={key:?}")),
        );
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(acknowledged: &[u64], tried: u64, found: Option<u64>, right: bool) {
        let ledger = Ledger::default();
        (0..tried).for_each(|_| {
            ledger.attempt(b"k");
        });
        acknowledged.iter().for_each(|value| ledger.acknowledge(b"k", *value));
        let found = found.map(|value| (b"k".to_vec(), value)).into_iter().collect();
        assert_eq!(ledger.differences(&found).is_empty(), right);
    }

    #[test]
    fn only_acknowledged_or_later_values_are_right() {
        check(&[1, 2], 2, Some(2), true);
        check(&[1], 2, Some(2), true);
        check(&[], 1, None, true);
        check(&[], 1, Some(1), true);
        check(&[1, 2], 2, Some(1), false);
        check(&[1], 1, None, false);
        check(&[1], 1, Some(2), false);
    }
}
