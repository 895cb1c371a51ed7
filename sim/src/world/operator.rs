//! The operator: does what the documentation tells a person to do, and nothing that the product should do by itself.
//!
//! | sees | does, after a moment |
//! |---|---|
//! | a node in the state `failed`, or one that did not start | starts it again |
//! | a node that refuses its damaged volume | wipes the volume and starts it: it joins anew |
//! | a node in the state `removed` whose id the leader does not name | wipes it: it is a spare machine |

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::cluster::{Cluster, Trouble};
use crate::rt::SimRng;

/// How often the operator looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Works until the world ends.
pub(crate) async fn run(cluster: Arc<Cluster>, mut rng: SimRng) {
    let mut since: BTreeMap<usize, (Trouble, Duration)> = BTreeMap::new();
    while !cluster.ending.load(Ordering::Relaxed) {
        let now = cluster.executor.now();
        for i in 0..cluster.size() {
            let Some(trouble) = cluster.trouble(i) else {
                since.remove(&i);
                continue;
            };
            let patience = Duration::from_micros(rng.range(20_000, 800_000));
            let (seen, until) = *since.entry(i).or_insert((trouble, now + patience));
            if seen != trouble {
                since.remove(&i);
            } else if now >= until {
                since.remove(&i);
                act(&cluster, i, trouble);
            }
        }
        cluster.executor.sleep_until(now + LOOK_EVERY).await;
    }
}

fn act(cluster: &Arc<Cluster>, i: usize, trouble: Trouble) {
    match trouble {
        Trouble::Failed => {
            cluster.log(|| format!("the operator starts n{i} again"));
            cluster.kill(i);
        }
        Trouble::Damaged => {
            cluster.log(|| format!("the operator wipes n{i}, which is damaged"));
            cluster.kill(i);
            cluster.wipe(i);
        }
        Trouble::Removed => {
            // The name may be that of a volume which an older copy has taken the place of.
            let id = cluster.node(i).map(|node| node.status().id);
            let named = cluster.view().is_none_or(|members| members.iter().any(|m| Some(m.id) == id));
            if named {
                return;
            }
            cluster.log(|| format!("the operator wipes n{i}, which was removed"));
            cluster.kill(i);
            cluster.wipe(i);
        }
    }
    cluster.start(i);
}
