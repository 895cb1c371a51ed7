//! `mainstay recover`: takes up a cluster that has lost its majority for good from one volume.
//!
//! # Place
//! the command line over [`mainstay_replication::examine`] and [`mainstay_replication::recover`], which decide
//! # Invariants
//! 1. `--plan` writes nothing. `--apply` does what the plan of that digest says, or nothing.

use std::path::Path;

use mainstay::{MemberInfo, MemberRole, target_of};
use mainstay_io::{Environment, MediaOptions};
use mainstay_replication::{RecoveryPlan, RecoveryVolume, examine, recover};
use serde_json::{Value, json};

use crate::cli::{Failure, RecoverArgs, print};
use crate::status::hex;

fn failure(data: &Path) -> impl Fn(String) -> Failure {
    let data = data.display().to_string();
    move |message| Failure::other(format!("{message} path={data}"))
}

fn media(data: &Path) -> Result<std::sync::Arc<dyn mainstay_io::Media>, Failure> {
    let media = mainstay_io::open_media(&target_of(data), &MediaOptions::default());
    media.map_err(|error| failure(data)(error.to_string()))
}

async fn look(data: &Path) -> Result<RecoveryVolume, Failure> {
    let label = data.display().to_string();
    examine(media(data)?, &Environment::system(), &label).await.map_err(|e| failure(data)(e.to_string()))
}

/// Shows the plan, or carries out the one that is confirmed.
pub(crate) async fn run(args: RecoverArgs) -> Result<(), Failure> {
    let mut others = Vec::new();
    for other in &args.other {
        others.push(look(other).await?);
    }
    let (plan, applied) = match &args.confirm {
        Some(digest) => {
            let label = args.data.display().to_string();
            let done = recover(media(&args.data)?, &Environment::system(), &label, others, digest).await;
            (done.map_err(|e| failure(&args.data)(e.to_string()))?, true)
        }
        None => {
            let plan = RecoveryPlan::new(look(&args.data).await?, others);
            (plan.map_err(|e| Failure::other(e.to_string()))?, false)
        }
    };
    print(args.json, &document(&plan, applied), || text(&plan, applied))
}

fn volume(volume: &RecoveryVolume) -> Value {
    json!({
        "path": volume.label,
        "cluster": hex(&volume.cluster),
        "node": volume.node.0,
        "incarnation": hex(&volume.incarnation),
        "term": volume.term,
        "last_term": volume.last_term,
        "last_log": volume.last.0,
        "committed": volume.committed.0,
        "flushed": volume.flushed.0,
    })
}

fn document(plan: &RecoveryPlan, applied: bool) -> Value {
    let member = |m: &MemberInfo| json!({ "id": m.id.0, "name": m.name, "voter": m.role == MemberRole::Voter });
    json!({
        "digest": plan.digest(),
        "applied": applied,
        "survivor": volume(&plan.survivor),
        "others": plan.others.iter().map(volume).collect::<Vec<_>>(),
        "removed": plan.removed().map(member).collect::<Vec<_>>(),
        "further_ahead": plan.further_ahead().map(|other| other.node.0),
        "uncertain": plan.uncertain().map(|(first, last)| [first.0, last.0]),
        "lossless": plan.is_lossless(),
        "lost_from": (!plan.is_lossless()).then(|| plan.survivor.last.0 + 1),
        "lost_to_at_least": plan.further_ahead().map(|other| other.last.0),
        "unread_voters": plan.unread_voters().iter().map(|id| id.0).collect::<Vec<_>>(),
    })
}

fn text(plan: &RecoveryPlan, applied: bool) -> String {
    let survivor = &plan.survivor;
    let mut text = format!("cluster {}\n", hex(&survivor.cluster));
    for (role, volume) in
        std::iter::once(("survivor", survivor)).chain(plan.others.iter().map(|other| ("other", other)))
    {
        text += &format!(
            "  {role:<9} node={} term={} last={} (of term {}) known committed={} in tables={}  {}\n",
            volume.node, volume.term, volume.last, volume.last_term, volume.committed, volume.flushed, volume.label
        );
    }
    for member in plan.removed() {
        let role = if member.role == MemberRole::Voter { "voter" } else { "learner" };
        text += &format!("  given up  {role} {} id={}: wipe its volume\n", member.name, member.id);
    }
    if let Some((first, last)) = plan.uncertain() {
        text += &format!("entries {first} to {last} are kept; nobody here knows whether they were committed\n");
    }
    text += &match (plan.further_ahead(), plan.is_lossless()) {
        (Some(ahead), _) => format!(
            "LOST are at least what node {} has behind entry {}, up to its entry {}: recover {} instead\n",
            ahead.node, survivor.last, ahead.last, ahead.label
        ),
        (None, true) => {
            "nothing that was acknowledged is lost: a majority was read, and none goes further\n".to_owned()
        }
        (None, false) => {
            let unread: Vec<String> = plan.unread_voters().iter().map(ToString::to_string).collect();
            let unread = unread.join(", ");
            format!(
                "MAY BE LOST: every entry behind {} that voters {unread} acknowledged without this volume\n",
                survivor.last
            )
        }
    };
    match (applied, plan.further_ahead()) {
        (true, _) => {
            text += "done: the volume is the only member; start its process, wipe the others and add them anew\n"
        }
        (false, None) => text += &format!("to do it: mainstay recover ... --apply --confirm {}\n", plan.digest()),
        (false, Some(_)) => {}
    }
    text
}
