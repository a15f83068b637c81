//! `flumen debug recover`: what is left when a majority of the replicas is lost for good goes on alone.
//!
//! Works on the directory of a stopped broker. Says first what that may lose, and changes nothing (beyond what every start
//! does) unless that is accepted. Then each group of which this node has a vote and the others are lost gets this node as its
//! only voter, in a term above those that others may have known. More replicas are for the running cluster to make.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::Args;
use flumen_raft::Membership;
use flumen_storage::{DataDir, GroupConfig, GroupHealth, GroupLog, HardState, Lane, ShardStore, StoreConfig};

use super::Failure;
use crate::cluster::identity::Identity;
use crate::cluster::node_id_of;
use crate::partition::raft_id;

/// Elections that nodes may have held which nobody hears of any more.
const TERMS_AHEAD: u64 = 1000;

#[derive(Args)]
pub struct RecoverArgs {
    /// The --data-dir of the broker that is left; it must be stopped
    data_dir: PathBuf,
    /// Ids of the nodes that will never come back
    #[arg(long, value_delimiter = ',', required = true)]
    lost: Vec<i32>,
    /// Do it: what only the lost nodes had is gone, and they must never be started again
    #[arg(long)]
    accept_data_loss: bool,
}

/// What is to be done with a group.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The others are a majority, or it has no others.
    Fine,
    /// This node has no vote in it.
    NotHere,
    Lost,
}

fn judge(membership: &Membership, own: u64, lost: &BTreeSet<u64>) -> Verdict {
    let without = |voters: &[u64]| {
        let left = voters.iter().filter(|id| !lost.contains(id)).count();
        !voters.is_empty() && left * 2 <= voters.len()
    };
    if !without(&membership.voters) && !without(&membership.outgoing) {
        Verdict::Fine
    } else if membership.is_voter(own) {
        Verdict::Lost
    } else {
        Verdict::NotHere
    }
}

pub fn run(args: RecoverArgs) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error.to_string()))?;
    tokio::task::LocalSet::new().block_on(&runtime, recover(&args)).map_err(Failure::new)
}

async fn recover(args: &RecoverArgs) -> Result<(), String> {
    let identity = Identity::load(&args.data_dir).map_err(|error| error.to_string())?;
    let Some(identity) = identity else {
        return Err(format!(
            "{} belongs to no cluster: there is nothing to recover",
            args.data_dir.display()
        ));
    };
    if args.lost.contains(&identity.node_id) {
        return Err(format!("node {} is the one whose directory this is", identity.node_id));
    }
    let own = raft_id(identity.node_id);
    let lost: BTreeSet<u64> = args.lost.iter().map(|id| raft_id(*id)).collect();
    let dir = DataDir::open(&args.data_dir).map_err(|error| error.to_string())?;
    let recovered = dir.recover(0).map_err(|error| error.to_string())?;
    let store = ShardStore::open(&dir, StoreConfig::default()).await.map_err(|error| error.to_string())?;
    let (mut of_lost, mut elsewhere, mut damaged) = (Vec::new(), 0, 0);
    for group in recovered {
        let name = group.dir_name.clone();
        if let GroupHealth::Damaged { reason } = &group.health {
            damaged += 1;
            out!("{name}: damaged, and stays as it is: {reason}");
            continue;
        }
        let log = store.attach(group, GroupConfig { direct: false, ..GroupConfig::default() });
        let found = log.raft_start();
        // One without a membership never had others.
        let Some((_, bytes)) = &found.membership else { continue };
        let (membership, _) = Membership::decode_stored(bytes).map_err(|error| format!("{name}: {error}"))?;
        match judge(&membership, own, &lost) {
            Verdict::Fine => {}
            Verdict::NotHere => {
                elsewhere += 1;
                out!(
                    "{name}: lost its majority, and this node has no vote in it; voters are {}",
                    ids(&membership.voters)
                );
            }
            Verdict::Lost => {
                out!("{name}: {}", what_may_be_lost(&log, &membership));
                of_lost.push((name, log, found.hard_state.term.max(found.last_term)));
            }
        }
    }
    out!(
        "{} groups lost their majority and can go on here, {elsewhere} cannot, {damaged} are damaged",
        of_lost.len()
    );
    if !args.accept_data_loss {
        stop(&store).await?;
        if of_lost.is_empty() {
            return Ok(());
        }
        return Err(format!(
            "nothing was changed. If {} will never come back, run it again with --accept-data-loss",
            nodes(&args.lost)
        ));
    }
    for (name, log, term) in &of_lost {
        let hard = HardState { term: term + TERMS_AHEAD, vote: 0, commit: log.last_index() };
        let alone = (log.last_index(), Membership::of_voters([own]).encode());
        let (lane, lsn) =
            log.stage_with(Some(hard), Some(alone), &[]).map_err(|error| format!("{name}: {error}"))?;
        until_durable(&store, lane, lsn).await?;
        out!("{name}: goes on with node {} alone", identity.node_id);
    }
    stop(&store).await?;
    out!(
        "Start this node. Then add new ones, and take {} away: flumen cluster decommission, flumen cluster remove",
        nodes(&args.lost)
    );
    Ok(())
}

async fn until_durable(store: &ShardStore, lane: Lane, lsn: u64) -> Result<(), String> {
    while store.durable_lsn(lane) < lsn {
        store.next_durable(lane, store.durable_lsn(lane)).await.map_err(|error| error.to_string())?;
    }
    Ok(())
}

async fn stop(store: &ShardStore) -> Result<(), String> {
    store.shutdown().await.map_err(|error| error.to_string())
}

fn ids(raft_ids: &[u64]) -> String {
    let known: Vec<String> =
        raft_ids.iter().filter_map(|id| node_id_of(*id)).map(|id| id.to_string()).collect();
    known.join(", ")
}

fn nodes(ids: &[i32]) -> String {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    format!("node {}", ids.join(", node "))
}

fn what_may_be_lost(log: &GroupLog, membership: &Membership) -> String {
    let (end, commit) = (log.log_end_offset(), log.raft_start().hard_state.commit);
    let committed = log.end_of(commit).unwrap_or(log.log_start_offset()).min(end);
    let unsure = match end - committed {
        0 => String::new(),
        count => format!(
            "; {count} offsets from {committed} on are here and may never have been acknowledged, and become part of it"
        ),
    };
    format!(
        "voters {} lost their majority; goes on up to offset {end}; what was acknowledged above is gone{unsure}",
        ids(&membership.voters)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_groups_without_a_majority_are_touched() {
        let lost = BTreeSet::from([2, 3]);
        let of = |voters: &[u64]| Membership::of_voters(voters);
        assert_eq!(judge(&of(&[1, 2, 3]), 1, &lost), Verdict::Lost);
        assert_eq!(judge(&of(&[1, 2]), 1, &lost), Verdict::Lost, "half is no majority");
        assert_eq!(judge(&of(&[1]), 1, &lost), Verdict::Fine);
        assert_eq!(judge(&of(&[1, 4, 3]), 1, &lost), Verdict::Fine);
        assert_eq!(judge(&of(&[2, 3]), 1, &lost), Verdict::NotHere);
        let learner = Membership { learners: vec![1], ..of(&[2, 3, 4]) };
        assert_eq!(judge(&learner, 1, &lost), Verdict::NotHere, "a learner may lack what was acknowledged");
        let joint = Membership { outgoing: vec![1, 2, 3], ..of(&[1, 4, 5]) };
        assert_eq!(judge(&joint, 1, &lost), Verdict::Lost);
    }
}
