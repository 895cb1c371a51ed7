//! What must hold while a world runs, and once its faults have stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mainstay_engine::{CommandBody, LogIndex, MAIN, Snapshot, WriteBatch};
use mainstay_replication::{Durability, MemberRole, Node, ReadLevel, Write};

use super::cluster::{Called, Cluster, SimNode};
use super::faults::HEALS_ITSELF;
use super::inserts::Inserts;
use super::placed;
use super::sessions::Sessions;
use super::workload::{Client, Notes, read_registers};
use crate::application::{Application, Session};
use crate::check;
use crate::rt::{SimRng, SimRuntime};

/// How often the state of all nodes is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Virtual time in which the cluster must work again once faults have stopped.
const HEAL_MAX: Duration = Duration::from_secs(60);

/// What is known of the cluster from looking at its nodes.
#[derive(Default)]
pub(crate) struct Watcher {
    leaders: BTreeMap<u64, usize>,
    digests: BTreeMap<u64, (u128, usize)>,
    applied: BTreeMap<(usize, u64), u64>,
}

impl Watcher {
    /// Looks at every node: one leader a term, one digest an index, nothing applied is taken back, no node failed.
    pub(crate) fn look(&mut self, cluster: &Cluster) {
        for i in 0..cluster.size() {
            let Some(node) = cluster.node(i) else { continue };
            let status = node.status();
            // What one fault has taken from a log is fetched from the others, and said so meanwhile; so is what a full ring did not take.
            let behind = status.log_heal.behind_tables > 0;
            let heals = status.role == "recovering" && (behind || cluster.settings.single_faults > 0);
            if let Some(failure) = &status.failure
                && !heals
                && !cluster.is_excused(i)
            {
                cluster.problem(format!("n{i} left service: {failure}"));
            }
            if status.role == "leader" {
                let first = *self.leaders.entry(status.term).or_insert(i);
                if first != i {
                    cluster.problem(format!("two leaders in term {}: n{first} and n{i}", status.term));
                }
            }
            let group = &status.group;
            if group.divergences > 0 {
                cluster.problem(format!("n{i} has {} tables that differ from the leader's", group.divergences));
            }
            if group.refused_installs > 0 {
                cluster.problem(format!("n{i} refused {} installs", group.refused_installs));
            }
            let (digest, first) = *self.digests.entry(group.digest_index.0).or_insert((group.digest, i));
            if digest != group.digest {
                let index = group.digest_index;
                cluster.problem(format!("digests of n{first} and n{i} differ at index {index}"));
            }
            let life = cluster.group(i).0;
            let applied = self.applied.entry((i, life)).or_default();
            if group.applied.0 < *applied {
                cluster.problem(format!("n{i} went back from {applied} to {}", group.applied));
            }
            *applied = group.applied.0;
        }
    }

    /// Terms in which somebody was seen to lead.
    pub(crate) fn elections(&self) -> u64 {
        self.leaders.len() as u64
    }

    /// Looks until `stop` says so.
    pub(crate) async fn run(mut self, cluster: Arc<Cluster>, notes: Arc<Notes>) -> Self {
        while !notes.stop.load(Ordering::Relaxed) {
            self.look(&cluster);
            cluster.executor.sleep_until(cluster.executor.now() + LOOK_EVERY).await;
        }
        self
    }
}

/// Waits until the cluster is whole: a leader whose members are all there, each under its id, and no change under way.
async fn whole(cluster: &Arc<Cluster>) -> Result<Vec<usize>, String> {
    let deadline = cluster.executor.now() + HEAL_MAX;
    loop {
        let members = cluster.view().unwrap_or_default();
        let nodes: Option<Vec<usize>> = members
            .iter()
            .map(|member| {
                let i = cluster.by_name(&member.name)?;
                let status = cluster.node(i)?.status();
                let serves = matches!(status.role.as_str(), "leader" | "follower" | "candidate" | "learner");
                (status.id == member.id && serves).then_some(i)
            })
            .collect();
        let voters = members.iter().filter(|m| m.role == MemberRole::Voter).count();
        let names: BTreeSet<_> = members.iter().map(|m| &m.name).collect();
        if let Some(mut nodes) = nodes
            && voters >= 3
            && names.len() == members.len()
            && !cluster.changing.load(Ordering::Relaxed)
        {
            nodes.sort_unstable();
            return Ok(nodes);
        }
        if cluster.executor.now() > deadline {
            let status = cluster.describe_all();
            return Err(format!("the cluster is not whole {HEAL_MAX:?} after the faults: {members:?}\n    {status}"));
        }
        cluster.executor.sleep_until(cluster.executor.now() + LOOK_EVERY).await;
    }
}

/// After the faults: every member takes part again and answers a write.
async fn progress(cluster: &Arc<Cluster>, members: &[usize]) -> Result<(), String> {
    let deadline = cluster.executor.now() + HEAL_MAX;
    for &i in members {
        let mut last = "it did not start".to_owned();
        loop {
            if cluster.executor.now() > deadline {
                let status = cluster.describe_all();
                return Err(format!("no progress through n{i} {HEAL_MAX:?} after the faults: {last}\n    {status}"));
            }
            let called = cluster
                .call(i, Duration::from_secs(2), |node| {
                    Box::pin(async move {
                        let body = CommandBody::Batch(WriteBatch { branch: MAIN, ops: Vec::new() });
                        node.write(Write { body, durability: Durability::Quorum }).await.map_err(|e| e.to_string())
                    })
                })
                .await;
            match called {
                Called::Answered(Ok(_)) => break,
                Called::Answered(Err(e)) => last = e,
                Called::Lost => "no answer".clone_into(&mut last),
                Called::Down => {}
            }
            cluster.executor.sleep_until(cluster.executor.now() + Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

/// Where each replica of a node stands, by group: what it has applied, how many installs it lacks, where its log ends.
type Places = BTreeMap<Option<String>, (LogIndex, u64, LogIndex)>;

fn places(cluster: &Cluster, i: usize) -> Option<Places> {
    let place = |replica: &SimNode| {
        let status = replica.status();
        (status.group.applied, status.group.absent_jobs, status.last_log)
    };
    Some(cluster.replicas(i)?.iter().map(|(name, replica)| (name.clone(), place(replica))).collect())
}

/// Waits until every member has applied the same of every group and holds every table it should, and nothing moves any more.
async fn settle(cluster: &Arc<Cluster>, members: &[usize]) -> Result<(), String> {
    let deadline = cluster.executor.now() + HEAL_MAX;
    let mut before = Vec::new();
    loop {
        let now: Vec<_> = members.iter().map(|i| places(cluster, *i)).collect();
        let rests = |places: &Places| places.values().all(|(applied, absent, last)| *absent == 0 && applied == last);
        let level = now.iter().all(|places| places.as_ref().is_some_and(rests) && *places == now[0]);
        if level && now == before {
            return Ok(());
        }
        if cluster.executor.now() > deadline {
            return Err(format!("replicas did not settle:\n    {}", cluster.describe_all()));
        }
        before = now;
        // Longer than a flush, a compaction and the round that installs it.
        cluster.executor.sleep_until(cluster.executor.now() + Duration::from_secs(1)).await;
    }
}

/// The manifest of each replica of a node, by group.
fn digests(cluster: &Cluster, i: usize) -> Option<BTreeMap<Option<String>, (u128, LogIndex)>> {
    let digest = |replica: &SimNode| {
        let group = replica.status().group;
        (group.digest, group.digest_index)
    };
    Some(cluster.replicas(i)?.iter().map(|(name, replica)| (name.clone(), digest(replica))).collect())
}

/// What the documentation tells the operator of damaged tables, while the product does not mend them by itself.
fn wipe_damaged(cluster: &Arc<Cluster>) {
    if HEALS_ITSELF {
        return;
    }
    for i in (0..cluster.size()).filter(|i| cluster.is_damaged(*i)) {
        cluster.kill(i);
        cluster.wipe(i);
        cluster.start(i);
    }
}

/// All pairs of a view, as a count and a hash.
pub(super) async fn scan(
    snapshot: &Snapshot,
    keyspaces: &[(String, mainstay_engine::KeyspaceId)],
) -> mainstay_engine::Result<(u64, u128)> {
    let (mut pairs, mut hasher) = (0, xxhash_rust::xxh3::Xxh3::new());
    // A checkpoint knows the keyspaces of its time.
    for (name, id) in keyspaces.iter().filter(|(name, _)| snapshot.keyspace(name).is_some()) {
        hasher.update(name.as_bytes());
        let mut scan = snapshot.range(*id, Bound::Unbounded, Bound::Unbounded);
        let mut last = None;
        while let Some((key, value)) = scan.next().await? {
            if last.as_ref().is_some_and(|last| *last >= key) {
                let message = format!("keys are out of order after {last:?}");
                return Err(mainstay_engine::Error::new(mainstay_engine::ErrorKind::Internal, message));
            }
            hasher.update(&(key.len() as u64).to_le_bytes());
            hasher.update(&key);
            hasher.update(&(value.len() as u64).to_le_bytes());
            hasher.update(&value);
            pairs += 1;
            last = Some(key);
        }
    }
    Ok((pairs, hasher.digest128()))
}

/// Everything that a replica holds: each branch and checkpoint by name.
async fn contents_of(replica: &Node<SimRuntime>) -> Result<BTreeMap<String, (u64, u128)>, String> {
    replica.read_barrier(ReadLevel::Linearizable).await.map_err(|e| e.to_string())?;
    let group = replica.group();
    let keyspaces = group.keyspaces();
    let mut found = BTreeMap::new();
    for branch in group.branches() {
        let view = group.snapshot(branch.id).map_err(|e| e.to_string())?;
        let held = scan(&view, &keyspaces).await.map_err(|e| format!("branch {}: {e}", branch.name))?;
        found.insert(format!("branch {}", branch.name), held);
    }
    for checkpoint in group.checkpoints() {
        let view = group.checkpoint(&checkpoint.name).map_err(|e| e.to_string())?;
        let held = scan(&view, &keyspaces).await.map_err(|e| format!("{}: {e}", checkpoint.name))?;
        found.insert(format!("checkpoint {}", checkpoint.name), held);
    }
    Ok(found)
}

/// What a node holds of each group, the first one without a name.
async fn contents(
    cluster: &Arc<Cluster>,
    i: usize,
) -> Result<BTreeMap<Option<String>, BTreeMap<String, (u64, u128)>>, String> {
    let called = cluster
        .call(i, Duration::from_secs(120), |node| {
            Box::pin(async move {
                let mut found = BTreeMap::from([(None, contents_of(&node).await?)]);
                for (name, replica) in node.groups() {
                    let held = contents_of(&replica).await.map_err(|e| format!("group {name}: {e}"))?;
                    found.insert(Some(name), held);
                }
                Ok::<_, String>(found)
            })
        })
        .await;
    match called {
        Called::Answered(answer) => answer.map_err(|e| format!("scan of n{i}: {e}")),
        Called::Down | Called::Lost => Err(format!("scan of n{i}: no answer")),
    }
}

/// What other clients did than those with a model of their own.
pub(crate) struct Aside<'a> {
    pub(crate) inserts: &'a [Arc<Inserts>],
    /// Whether there is a keyspace placed on groups.
    pub(crate) placed: bool,
    pub(crate) sessions: Option<&'a Sessions>,
}

/// The last judgement. Problems go to the cluster's list; an `Err` ends it early.
pub(crate) async fn judge(
    cluster: &Arc<Cluster>,
    notes: &Arc<Notes>,
    watcher: &mut Watcher,
    clients: &mut [Client],
    aside: &Aside<'_>,
    application: &dyn Application,
    rng: &mut SimRng,
) -> Result<(), String> {
    wipe_damaged(cluster);
    let members = whole(cluster).await?;
    progress(cluster, &members).await?;
    if aside.sessions.is_some() {
        Sessions::set_walls(cluster);
    }
    settle(cluster, &members).await?;
    watcher.look(cluster);
    // A witness has nothing that could be compared.
    let members: Vec<usize> = members.into_iter().filter(|i| !cluster.is_witness(*i)).collect();
    let digests: Vec<_> = members.iter().map(|i| digests(cluster, *i)).collect();
    if digests.iter().any(|digest| *digest != digests[0]) {
        return Err(format!("replicas settled on different manifests: {digests:?}\n    {}", cluster.describe_all()));
    }
    let first = contents(cluster, members[0]).await?;
    for &i in &members[1..] {
        let other = contents(cluster, i).await?;
        if other != first {
            return Err(format!("n{} and n{i} hold different data: {first:?} and {other:?}", members[0]));
        }
    }
    for &i in &members {
        for inserts in aside.inserts {
            inserts.check(cluster, i).await?;
        }
        if let Some(sessions) = aside.sessions {
            sessions.check(i).await?;
        }
        if aside.placed {
            placed::check(cluster, notes, i).await?;
        }
        read_registers(cluster, notes, i).await?;
        for client in clients.iter_mut() {
            if !client.check_all(i).await {
                return Err(format!("n{i} did not answer the last reads"));
            }
        }
        let mut session = Session::new(1000 + i as u64, cluster, notes, rng.fork());
        session.fix(i);
        application.look(&mut session).await.map_err(|e| format!("n{i}: {e}"))?;
    }
    application.judge()?;
    check::check(&notes.history()).map_err(|violation| format!("not linearizable: {violation}"))
}

#[cfg(test)]
mod tests {
    use mainstay_replication::Error;

    use super::*;
    use crate::net::{Net, NetSettings};
    use crate::rt::Executor;
    use crate::transactions::Transactions;
    use crate::world::{Settings, birth};

    async fn write_aside(cluster: &Arc<Cluster>, through: usize) {
        let called = cluster
            .call(through, Duration::from_secs(5), |node| {
                Box::pin(async move {
                    let body = CommandBody::Batch(WriteBatch { branch: MAIN, ops: Vec::new() });
                    let aside = node.create_group("aside").await?;
                    aside.write(Write { body, durability: Durability::Quorum }).await?;
                    Ok::<_, Error>(())
                })
            })
            .await;
        assert!(matches!(called, Called::Answered(Ok(()))), "two of three are there");
    }

    /// A member whose replica of the second group had nothing of it was taken for whole, and read.
    #[test]
    fn a_member_that_lacks_entries_of_any_group_is_not_whole() {
        let mut rng = SimRng::new(7);
        let mut settings = Settings::draw(&mut rng);
        (settings.nodes, settings.spares, settings.witness, settings.clock_drift) = (3, 0, Some(false), 0);
        let executor = Executor::new(7);
        let net = Net::new(&executor, NetSettings::calm());
        let cluster = Cluster::new(&executor, &net, &settings, Transactions::new(), &mut rng);
        executor.block_on(async {
            (0..3).for_each(|i| cluster.start(i));
            birth(&cluster).await.expect("born");
            let members = whole(&cluster).await.expect("three");
            let last = cluster.last_logs().expect("there is a leader");
            let leader = cluster.leader().expect("there is one");
            write_aside(&cluster, leader).await;
            settle(&cluster, &members).await.expect("all have both groups");
            assert!(cluster.are_whole_to(&mut last.clone()));

            let away = (leader + 1) % 3;
            for other in (0..3).filter(|i| *i != away) {
                net.cut(cluster.address(away), cluster.address(other));
                net.cut(cluster.address(other), cluster.address(away));
            }
            write_aside(&cluster, leader).await;
            assert!(!cluster.are_whole_to(&mut last.clone()), "one lacks what was written since");
            settle(&cluster, &members).await.expect_err("the first group is at rest, the second is not");

            net.mend_all();
            settle(&cluster, &members).await.expect("all have both groups again");
            assert!(cluster.are_whole_to(&mut last.clone()));
            (0..3).for_each(|i| cluster.kill(i));
        });
        executor.shut_down();
    }
}
