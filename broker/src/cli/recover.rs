//! `flumen debug recover`: what is left when a majority of the replicas is lost for good goes on with those that are left.
//!
//! Works on the directory of a stopped broker. Says first what that may lose, and changes nothing (beyond what every start
//! does) unless that is accepted. Where several nodes are left, each writes a report of what it has, and is given those of the
//! others: all come to the same conclusion by themselves (`plan`, pure). More replicas are for the running cluster to make.
//!
//! For each group that lost its majority:
//! - The survivor with the most complete log (last term, then last index: who would win an election) is what goes on. What is
//!   committed anywhere among the survivors is in it.
//! - It votes from now on, and with it every survivor whose log is a beginning of its log; all that these have counts as committed.
//!   They need no copy, and what is acknowledged next is on a majority of them.
//! - A survivor whose log ends in what the winner has not keeps its log, and has no vote: it gives up that end when it becomes a
//!   replica again. If the members changed in what it lacks, it cannot: its node is to be replaced.
//! - They begin in a term above those that anybody may have known, with a membership as of the winner's last entry.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Args;
use flumen_raft::Membership;
use flumen_storage::{DataDir, GroupConfig, GroupHealth, GroupLog, HardState, Lane, ShardStore, StoreConfig};
use serde::{Deserialize, Serialize};

use super::Failure;
use crate::cluster::identity::Identity;
use crate::cluster::node_id_of;
use crate::partition::raft_id;
use crate::shard::group_of;

/// Elections that nodes may have held which nobody hears of any more.
const TERMS_AHEAD: u64 = 1000;

#[derive(Args)]
pub struct RecoverArgs {
    /// The --data-dir of a broker that is left; it must be stopped
    data_dir: PathBuf,
    /// Ids of the nodes that will never come back
    #[arg(long, value_delimiter = ',', required = true)]
    lost: Vec<i32>,
    /// Write to this file what is here, for the other nodes that are left
    #[arg(long)]
    report: Option<PathBuf>,
    /// The reports of all other nodes that are left
    #[arg(long, value_delimiter = ',')]
    others: Vec<PathBuf>,
    /// Do it: what only the lost nodes had is gone, and they must never be started again
    #[arg(long)]
    accept_data_loss: bool,
}

/// What a node has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Report {
    cluster_id: String,
    node_id: i32,
    groups: Vec<Held>,
}

/// A replica.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    group: u64,
    name: String,
    /// The newest that it knows.
    term: u64,
    last_term: u64,
    last_index: u64,
    commit: u64,
    end_offset: i64,
    /// Index and term of the entry before the first that it has, then first indexes of terms.
    before: (u64, u64),
    terms: Vec<(u64, u64)>,
    membership_index: u64,
    voters: Vec<u64>,
    outgoing: Vec<u64>,
    learners: Vec<u64>,
    damaged: bool,
}

impl Held {
    fn members(&self) -> Membership {
        let mut members = Membership::of_voters(self.voters.clone());
        (members.outgoing, members.learners) = (self.outgoing.clone(), self.learners.clone());
        members
    }

    /// Of the entry at an index that it has.
    fn term_at(&self, index: u64) -> Option<u64> {
        if index > self.last_index || index < self.before.0 {
            return None;
        }
        if index == self.last_index {
            return Some(self.last_term);
        }
        if index == self.before.0 {
            return Some(self.before.1);
        }
        let at = self.terms.partition_point(|(first, _)| *first <= index);
        Some(at.checked_sub(1).map_or(self.before.1, |at| self.terms[at].1))
    }

    /// All of its entries are the other's, too.
    fn is_beginning_of(&self, other: &Held) -> bool {
        other.term_at(self.last_index) == Some(self.last_term)
    }
}

/// What is to be done with a group on one node.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    /// The others are a majority, or it has no others.
    Fine,
    /// No survivor has a vote in it, or only those whose logs are damaged.
    Nobody,
    /// Another survivor goes on with it, and this one has no vote.
    Elsewhere { winner: u64 },
    /// These vote, from this entry of the winner's log on, in this term.
    Votes { winner: u64, index: u64, term: u64, voters: Vec<u64> },
    /// It has no vote as of what it has committed.
    Outside { winner: u64, term: u64, voters: Vec<u64> },
    /// It cannot become a replica again.
    Unusable { winner: u64 },
}

fn is_majority_lost(members: &Membership, lost: &BTreeSet<u64>) -> bool {
    let without = |voters: &[u64]| {
        let left = voters.iter().filter(|id| !lost.contains(id)).count();
        !voters.is_empty() && left * 2 <= voters.len()
    };
    without(&members.voters) || without(&members.outgoing)
}

/// `replicas`: of one group, by Raft's ids of all survivors that have one, `own` among them.
fn plan(own: u64, replicas: &BTreeMap<u64, &Held>, lost: &BTreeSet<u64>) -> Verdict {
    let healthy = replicas.values().filter(|held| !held.damaged);
    let Some(newest) = healthy.max_by_key(|held| held.membership_index) else {
        return Verdict::Nobody;
    };
    let members = newest.members();
    if !is_majority_lost(&members, lost) {
        return Verdict::Fine;
    }
    let voting = replicas.iter().filter(|(id, held)| members.is_voter(**id) && !held.damaged);
    let most =
        voting.clone().max_by_key(|(id, held)| (held.last_term, held.last_index, std::cmp::Reverse(**id)));
    let Some((winner, best)) = most else { return Verdict::Nobody };
    let voters: Vec<u64> = voting.filter(|(_, held)| held.is_beginning_of(best)).map(|(id, _)| *id).collect();
    let term = replicas.values().map(|held| held.term.max(held.last_term)).max().unwrap_or(0) + TERMS_AHEAD;
    let winner = *winner;
    let here = replicas.get(&own).filter(|held| !held.damaged);
    match here {
        _ if voters.contains(&own) => Verdict::Votes { winner, index: best.last_index, term, voters },
        // What it takes from the winner above what it has committed must not contradict that, nor make other members of these.
        // (Of a voter's commits none is missing there; a learner may have had more than any voter that is left.)
        Some(held)
            if best.membership_index <= held.commit
                && held.term_at(held.commit).is_some_and(|term| best.term_at(held.commit) == Some(term)) =>
        {
            Verdict::Outside { winner, term, voters }
        }
        Some(_) => Verdict::Unusable { winner },
        None => Verdict::Elsewhere { winner },
    }
}

pub fn run(args: RecoverArgs) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(error.to_string()))?;
    tokio::task::LocalSet::new().block_on(&runtime, recover(&args)).map_err(Failure::new)
}

fn read_report(path: &Path) -> Result<Report, String> {
    let text = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    serde_json::from_slice(&text).map_err(|error| format!("{} is no report: {error}", path.display()))
}

/// The reports of the others, by Raft's ids.
fn reports_of_others(args: &RecoverArgs, identity: &Identity) -> Result<BTreeMap<u64, Report>, String> {
    let mut others = BTreeMap::new();
    for path in &args.others {
        let report = read_report(path)?;
        let (id, from) = (report.node_id, path.display());
        if report.cluster_id != identity.cluster_id.to_string() {
            return Err(format!("{from} is of another cluster, {}", report.cluster_id));
        }
        if id == identity.node_id || args.lost.contains(&id) {
            return Err(format!("{from} is of node {id}, which is no other node that is left"));
        }
        if others.insert(raft_id(id), report).is_some() {
            return Err(format!("{from} is a second report of node {id}"));
        }
    }
    Ok(others)
}

fn held_of(group: u64, name: &str, log: &GroupLog) -> Result<Option<Held>, String> {
    let found = log.raft_start();
    // One without a membership never had others.
    let Some((membership_index, bytes)) = &found.membership else { return Ok(None) };
    let (members, _) = Membership::decode_stored(bytes).map_err(|error| format!("{name}: {error}"))?;
    Ok(Some(Held {
        group,
        name: name.to_string(),
        term: found.hard_state.term,
        last_term: found.last_term,
        last_index: found.last_index,
        commit: found.hard_state.commit,
        end_offset: log.log_end_offset(),
        before: found.before,
        terms: found.terms,
        membership_index: *membership_index,
        voters: members.voters,
        outgoing: members.outgoing,
        learners: members.learners,
        damaged: false,
    }))
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
    let others = reports_of_others(args, &identity)?;
    let lost: BTreeSet<u64> = args.lost.iter().map(|id| raft_id(*id)).collect();
    let dir = DataDir::open(&args.data_dir).map_err(|error| error.to_string())?;
    let recovered = dir.recover(0).map_err(|error| error.to_string())?;
    let store = ShardStore::open(&dir, StoreConfig::default()).await.map_err(|error| error.to_string())?;
    let (mut held, mut logs) = (Vec::new(), BTreeMap::new());
    let mut damaged = 0;
    for group in recovered {
        let (name, id) = (group.dir_name.clone(), group_of(group.group_id));
        if let GroupHealth::Damaged { reason } = &group.health {
            damaged += 1;
            out!("{name}: damaged, and stays as it is: {reason}");
            held.push(Held { group: id, name, damaged: true, ..Held::default() });
            continue;
        }
        let log = store.attach(group, GroupConfig { direct: false, ..GroupConfig::default() });
        if let Some(found) = held_of(id, &name, &log)? {
            held.push(found);
            logs.insert(id, log);
        }
    }
    let own_report =
        Report { cluster_id: identity.cluster_id.to_string(), node_id: identity.node_id, groups: held };
    if let Some(path) = &args.report {
        let text = serde_json::to_vec_pretty(&own_report).map_err(|error| error.to_string())?;
        std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        stop(&store).await?;
        out!("{}: what node {} has, for the other nodes that are left", path.display(), identity.node_id);
        return Ok(());
    }
    let mut groups: BTreeMap<u64, BTreeMap<u64, &Held>> = BTreeMap::new();
    for (id, report) in others.iter().map(|(id, report)| (*id, report)).chain([(own, &own_report)]) {
        for held in &report.groups {
            groups.entry(held.group).or_default().insert(id, held);
        }
    }
    let (mut to_do, mut elsewhere, mut unreported) = (Vec::new(), 0, BTreeSet::new());
    for held in &own_report.groups {
        let replicas = &groups[&held.group];
        let verdict = plan(own, replicas, &lost);
        let (name, of) = (&held.name, |id: u64| node_id_of(id).unwrap_or(-1));
        if !matches!(verdict, Verdict::Fine) {
            let all = held.voters.iter().chain(&held.outgoing);
            let is_known = |id: &&u64| lost.contains(id) || **id == own || others.contains_key(id);
            unreported.extend(all.filter(|id| !is_known(id)).copied());
        }
        match verdict {
            Verdict::Fine => continue,
            Verdict::Nobody if held.damaged => continue,
            Verdict::Nobody => {
                elsewhere += 1;
                out!(
                    "{name}: lost its majority, and this node has no vote in it; voters are {}",
                    ids(&held.voters)
                );
                continue;
            }
            Verdict::Elsewhere { winner } => {
                elsewhere += 1;
                out!("{name}: lost its majority, and goes on with node {}", of(winner));
                continue;
            }
            Verdict::Unusable { winner } => {
                elsewhere += 1;
                out!(
                    "{name}: lost its majority, and goes on with node {}; the replica here cannot be used any more: replace this node",
                    of(winner)
                );
                continue;
            }
            Verdict::Votes { winner, .. } if winner == own => {
                out!("{name}: {}", what_may_be_lost(held, &logs[&held.group]));
            }
            Verdict::Votes { winner, .. } => {
                out!(
                    "{name}: votes for what node {} has, up to offset {}",
                    of(winner),
                    replicas[&winner].end_offset
                );
            }
            Verdict::Outside { winner, .. } => {
                out!("{name}: goes on with node {}; here it has no vote", of(winner));
            }
        }
        to_do.push((held, verdict));
    }
    out!(
        "{} groups lost their majority and can go on here, {elsewhere} cannot, {damaged} are damaged",
        to_do.len()
    );
    if !unreported.is_empty() {
        stop(&store).await?;
        let nodes = unreported.iter().filter_map(|id| node_id_of(*id)).collect::<Vec<_>>();
        return Err(format!(
            "nothing was changed. {} may have more of them: run this there with --report FILE and bring the file here with \
             --others FILE; or, if lost, name it with --lost",
            nodes_named(&nodes)
        ));
    }
    if !args.accept_data_loss {
        stop(&store).await?;
        if to_do.is_empty() {
            return Ok(());
        }
        return Err(format!(
            "nothing was changed. If {} will never come back, run it again with --accept-data-loss",
            nodes_named(&args.lost)
        ));
    }
    for (held, verdict) in &to_do {
        let (name, log) = (&held.name, &logs[&held.group]);
        let (hard, membership, told) = match verdict {
            Verdict::Votes { index, term, voters, .. } => {
                let hard = HardState { term: *term, vote: 0, commit: held.last_index };
                let alone = if voters.len() == 1 { " alone" } else { "" };
                let told = format!("goes on with node {}{alone}", ids(voters));
                (hard, (*index, Membership::of_voters(voters.clone()).encode()), told)
            }
            Verdict::Outside { term, voters, winner } => {
                let hard = HardState { term: *term, vote: 0, commit: held.commit };
                let told =
                    format!("goes on with node {}; here without a vote", node_id_of(*winner).unwrap_or(-1));
                (hard, (held.commit, Membership::of_voters(voters.clone()).encode()), told)
            }
            _ => continue,
        };
        let (lane, lsn) =
            log.stage_with(Some(hard), Some(membership), &[]).map_err(|error| format!("{name}: {error}"))?;
        until_durable(&store, lane, lsn).await?;
        out!("{name}: {told}");
    }
    stop(&store).await?;
    let all = others.values().map(|report| report.node_id).collect::<Vec<_>>();
    if all.is_empty() {
        out!("Start this node. Then add new ones, and take {} away:", nodes_named(&args.lost));
    } else {
        out!(
            "Do the same for {}, and start them with this one. Then add new nodes, and take {} away:",
            nodes_named(&all),
            nodes_named(&args.lost)
        );
    }
    out!("flumen cluster decommission, flumen cluster remove");
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

fn nodes_named(ids: &[i32]) -> String {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    format!("node {}", ids.join(", node "))
}

fn what_may_be_lost(held: &Held, log: &GroupLog) -> String {
    let end = held.end_offset;
    let committed = log.end_of(held.commit).unwrap_or(log.log_start_offset()).min(end);
    let unsure = match end - committed {
        0 => String::new(),
        count => format!(
            "; {count} offsets from {committed} on are here and may never have been acknowledged, and become part of it"
        ),
    };
    format!(
        "voters {} lost their majority; goes on up to offset {end}; what was acknowledged above is gone{unsure}",
        ids(&held.voters)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(voters: &[u64], last: (u64, u64), commit: u64) -> Held {
        Held {
            group: 7,
            term: 5,
            last_term: last.0,
            last_index: last.1,
            commit,
            terms: vec![(1, 1), (50, 2), (90, 4)].into_iter().filter(|(_, term)| *term <= last.0).collect(),
            voters: voters.to_vec(),
            ..Held::default()
        }
    }

    fn planned(own: u64, replicas: &[(u64, &Held)], lost: &[u64]) -> Verdict {
        let replicas: BTreeMap<u64, &Held> = replicas.iter().copied().collect();
        plan(own, &replicas, &lost.iter().copied().collect())
    }

    #[test]
    fn only_groups_without_a_majority_are_touched() {
        let of = |own: u64, members: Membership| {
            let mut one = held(&members.voters, (4, 100), 100);
            (one.outgoing, one.learners) = (members.outgoing, members.learners);
            planned(own, &[(own, &one)], &[2, 3])
        };
        let voters = |voters: &[u64]| Membership::of_voters(voters);
        let alone = Verdict::Votes { winner: 1, index: 100, term: 1005, voters: vec![1] };
        assert_eq!(of(1, voters(&[1, 2, 3])), alone);
        assert_eq!(of(1, voters(&[1, 2])), alone, "half is no majority");
        assert_eq!(of(1, voters(&[1])), Verdict::Fine);
        assert_eq!(of(1, voters(&[1, 4, 3])), Verdict::Fine);
        assert_eq!(of(1, voters(&[2, 3])), Verdict::Nobody);
        let learner = Membership { learners: vec![1], ..voters(&[2, 3, 4]) };
        assert_eq!(of(1, learner), Verdict::Nobody, "a learner may lack what was acknowledged");
        let joint = Membership { outgoing: vec![1, 2, 3], ..voters(&[1, 4, 5]) };
        assert_eq!(of(1, joint), alone);
    }

    #[test]
    fn the_most_complete_log_goes_on_and_those_that_are_its_beginning_vote() {
        let (five, lost) = ([1, 2, 3, 4, 5], [3, 4, 5]);
        let (long, short) = (held(&five, (4, 100), 90), held(&five, (4, 95), 90));
        let votes = Verdict::Votes { winner: 1, index: 100, term: 1005, voters: vec![1, 2] };
        // Both come to the same conclusion.
        for own in [1, 2] {
            assert_eq!(planned(own, &[(1, &long), (2, &short)], &lost), votes);
        }
        let equal = Verdict::Votes { winner: 1, index: 100, term: 1005, voters: vec![1, 2] };
        assert_eq!(planned(2, &[(1, &long), (2, &long)], &lost), equal);
        // A later term is more than a longer log; one that ended in the middle of an older term is a beginning.
        let old = held(&five, (2, 89), 60);
        assert_eq!(planned(2, &[(1, &long), (2, &old)], &lost), votes);
        let diverged = held(&five, (2, 120), 60);
        let outside = Verdict::Outside { winner: 1, term: 1005, voters: vec![1] };
        assert_eq!(planned(2, &[(1, &long), (2, &diverged)], &lost), outside);
        let alone = Verdict::Votes { winner: 1, index: 100, term: 1005, voters: vec![1] };
        assert_eq!(planned(1, &[(1, &long), (2, &diverged)], &lost), alone);
        // The members changed in what it lacks.
        let changed = Held { membership_index: 70, ..long.clone() };
        assert_eq!(planned(2, &[(1, &changed), (2, &diverged)], &lost), Verdict::Unusable { winner: 1 });
    }

    #[test]
    fn a_survivor_that_has_no_vote_or_is_damaged_leaves_it_to_the_others() {
        let (three, lost) = ([1, 3, 4], [3, 4, 5]);
        let (voter, other) = (held(&three, (4, 100), 90), held(&three, (4, 200), 200));
        assert_eq!(planned(2, &[(1, &voter), (2, &other)], &lost), Verdict::Unusable { winner: 1 });
        let learner = held(&three, (4, 95), 95);
        let outside = Verdict::Outside { winner: 1, term: 1005, voters: vec![1] };
        assert_eq!(planned(2, &[(1, &voter), (2, &learner)], &lost), outside);
        let damaged = Held { group: 7, damaged: true, ..Held::default() };
        let both = held(&[1, 2, 3, 4, 5], (4, 100), 90);
        assert_eq!(planned(2, &[(1, &both), (2, &damaged)], &lost), Verdict::Elsewhere { winner: 1 });
        assert_eq!(planned(2, &[(2, &damaged)], &lost), Verdict::Nobody, "nothing is known of it");
        // What the newest membership says counts: a majority of that lives.
        let newer = Held { membership_index: 80, ..held(&[1, 2, 6], (4, 100), 90) };
        assert_eq!(planned(2, &[(1, &newer), (2, &both)], &lost), Verdict::Fine);
    }

    #[test]
    fn terms_are_those_of_the_runs() {
        let one = Held { before: (10, 1), ..held(&[1], (4, 100), 100) };
        let at = [9, 10, 11, 49, 50, 89, 90, 100, 101].map(|index| one.term_at(index));
        assert_eq!(at, [None, Some(1), Some(1), Some(1), Some(2), Some(2), Some(4), Some(4), None]);
    }
}
