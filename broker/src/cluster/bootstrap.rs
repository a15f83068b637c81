//! How a node with an empty data directory comes to a cluster: it founds one together with its seeds, or joins one.
//!
//! Pure: what the seeds answered goes in, what to do comes out. The shell (`joining`) asks again and again until there is
//! something to do, makes the decision durable, and only then acts.
//!
//! Why no two clusters come of one list of seeds. A cluster acts only when a majority of its founders has stored that they
//! belong to it. All founders are named by the addresses of the list, a process stores one cluster for ever, and takes only
//! one that names it under the address at which it found itself. Two clusters of one list would each need a majority of
//! the same addresses. The seed with the lowest id founds, and only when every seed has answered that it is empty and has
//! the same list; so in practice there is not even an attempt at a second one.
//!
//! Why no founder votes twice. One that comes with an empty directory may have lost what it had voted and acknowledged; it takes
//! the part of a founder only when a member whose metadata is current does not know its id, or when all seeds answer and none
//! has ever been confirmed, so that nothing was acknowledged yet.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::identity::{FOUNDERS_MAX, Founder};
use crate::waits::Wait;

/// What a node says when it is asked who it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    pub node_id: i32,
    pub boot_id: u64,
    pub seeds: Vec<String>,
    pub state: State,
    /// While it does not serve; brokers of before did not say.
    #[serde(default)]
    pub waits: Option<Wait>,
    /// Its wall clock when it said this; 0 from brokers of before.
    #[serde(default)]
    pub clock_ms: i64,
}

/// Clocks that anybody keeps are within a second of each other; where they are this far apart, retention, searches by time and what
/// is exported as a record's time go wrong.
pub const CLOCKS_APART_MAX_MS: i64 = 60_000;

/// Between two clocks: "3600 s ahead of", "60 s behind".
pub fn apart_in_words(ahead_ms: i64) -> String {
    let seconds = ahead_ms.saturating_abs() / 1_000;
    format!("{seconds} s {}", if ahead_ms > 0 { "ahead of" } else { "behind" })
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Has no cluster, and waits for one.
    Empty,
    Member {
        cluster_id: String,
        founders: Vec<Founder>,
        /// Registered nodes, as far as the answering one knows.
        nodes: Vec<i32>,
        standing: Standing,
    },
}

/// What a member's word about the nodes is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Standing {
    /// The cluster has not confirmed it yet.
    New,
    /// Confirmed in an earlier life; what it knows may be old.
    Known,
    /// What it knows is no older than its process.
    Current,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Ask again later; the sentence says what is waited for.
    Wait(String),
    /// Form a cluster of these.
    Found(Vec<Founder>),
    /// Take the part of a founder in a cluster that names this node so.
    Adopt {
        cluster_id: String,
        founders: Vec<Founder>,
        address: String,
    },
    Join {
        cluster_id: String,
        founders: Vec<Founder>,
    },
    /// Nothing will come of it; the sentence says what to do.
    Refuse(String),
}

/// Duplicates and too many are refused before anything is asked.
pub fn check_seeds(seeds: &[String]) -> Result<(), String> {
    let distinct: BTreeSet<&String> = seeds.iter().collect();
    if distinct.len() < seeds.len() {
        return Err("--seeds names an address twice; name each broker once".to_string());
    }
    if seeds.is_empty() || seeds.len() > FOUNDERS_MAX {
        return Err(format!(
            "--seeds names {} brokers; name 1 to {FOUNDERS_MAX} (three, usually; brokers that are not seeds join later)",
            seeds.len()
        ));
    }
    for seed in seeds {
        let port =
            seed.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port.parse::<u16>());
        if !matches!(port, Some(Ok(1..))) || seed.contains(char::is_whitespace) {
            return Err(format!("--seeds wants HOST:PORT,HOST:PORT,...; '{seed}' is not HOST:PORT"));
        }
    }
    Ok(())
}

/// `answers` are those of `own.seeds`, in that order; none where nobody answered.
pub fn decide(own: &Presence, answers: &[Option<Presence>]) -> Decision {
    let answered: Vec<(&String, &Presence)> =
        own.seeds.iter().zip(answers).filter_map(|(seed, answer)| Some((seed, answer.as_ref()?))).collect();
    let own_address = answered.iter().find(|(_, a)| a.boot_id == own.boot_id).map(|(seed, _)| *seed);
    if let Some((seed, _)) =
        answered.iter().find(|(_, a)| a.node_id == own.node_id && a.boot_id != own.boot_id)
    {
        return Decision::Refuse(format!(
            "the broker at {seed} has the node id {} of this one; start one of them with another --node-id",
            own.node_id
        ));
    }
    if let Some(sentence) = clock_is_off(own, &answered) {
        return Decision::Refuse(sentence);
    }
    let mut clusters: BTreeMap<&str, Known<'_>> = BTreeMap::new();
    for (seed, answer) in &answered {
        if let State::Member { cluster_id, founders, nodes, standing } = &answer.state {
            let told = Known { cluster_id, seed, founders, nodes, standing: *standing };
            let known = clusters.entry(cluster_id).or_insert(told);
            if (*standing, nodes.len()) > (known.standing, known.nodes.len()) {
                (known.nodes, known.standing) = (nodes, *standing);
            }
        }
    }
    let mut found = clusters.values();
    if let Some(cluster) = found.next() {
        if let Some(other) = found.next() {
            return Decision::Refuse(format!(
                "the seeds belong to different clusters: {} to {}, {} to {}; name the brokers of one in --seeds",
                cluster.seed, cluster.cluster_id, other.seed, other.cluster_id
            ));
        }
        let all_answer = answered.len() == own.seeds.len();
        return decide_about_cluster(own, own_address, all_answer, cluster);
    }
    let Some(own_address) = own_address else {
        return Decision::Wait(format!(
            "no seed of {} has a cluster yet; this broker is none of the seeds and joins when they have formed one",
            own.seeds.join(", ")
        ));
    };
    let missing: Vec<&str> = own
        .seeds
        .iter()
        .zip(answers)
        .filter(|(_, answer)| answer.is_none())
        .map(|(seed, _)| seed.as_str())
        .collect();
    if !missing.is_empty() {
        return Decision::Wait(format!(
            "the seeds {} do not answer yet; a new cluster is formed only when all have",
            missing.join(", ")
        ));
    }
    let set = |seeds: &[String]| seeds.iter().cloned().collect::<BTreeSet<String>>();
    if let Some((seed, answer)) = answered.iter().find(|(_, a)| set(&a.seeds) != set(&own.seeds)) {
        return Decision::Refuse(format!(
            "the broker at {seed} was started with --seeds {}, this one with --seeds {}; give all seeds the same list",
            answer.seeds.join(","),
            own.seeds.join(",")
        ));
    }
    let mut founders: Vec<Founder> =
        answered.iter().map(|(seed, a)| Founder { node_id: a.node_id, address: (*seed).clone() }).collect();
    founders.sort_by_key(|f| f.node_id);
    if let Some(pair) = founders.windows(2).find(|pair| pair[0].node_id == pair[1].node_id) {
        return Decision::Refuse(format!(
            "the brokers at {} and {} both have the node id {}; start one of them with another --node-id",
            pair[0].address, pair[1].address, pair[0].node_id
        ));
    }
    match founders.first() {
        Some(first) if &first.address == own_address => Decision::Found(founders),
        Some(first) => Decision::Wait(format!(
            "the seeds are complete; node {} at {} forms the cluster",
            first.node_id, first.address
        )),
        None => Decision::Wait("there are no seeds".to_string()),
    }
}

/// Whether the clock of this machine is far from those of most others that answer; what there is to do then.
fn clock_is_off(own: &Presence, answered: &[(&String, &Presence)]) -> Option<String> {
    let others =
        answered.iter().filter(|(_, a)| a.boot_id != own.boot_id && a.clock_ms > 0 && own.clock_ms > 0);
    let ahead: Vec<(&String, i64)> =
        others.map(|(seed, a)| (*seed, own.clock_ms.saturating_sub(a.clock_ms))).collect();
    let apart: Vec<&(&String, i64)> =
        ahead.iter().filter(|(_, ms)| ms.saturating_abs() > CLOCKS_APART_MAX_MS).collect();
    let (seed, ms) = apart.first().filter(|_| 2 * apart.len() > ahead.len())?;
    Some(format!(
        "the clock of this machine is {} that of the broker at {seed}; set it right on both (chrony, systemd-timesyncd), \
         then start this broker again",
        apart_in_words(*ms)
    ))
}

/// A cluster, as the member says whose word is worth most.
struct Known<'a> {
    cluster_id: &'a str,
    seed: &'a str,
    founders: &'a [Founder],
    nodes: &'a [i32],
    standing: Standing,
}

fn decide_about_cluster(
    own: &Presence,
    own_address: Option<&String>,
    all_answer: bool,
    cluster: &Known<'_>,
) -> Decision {
    let Known { cluster_id, founders, nodes, standing, .. } = *cluster;
    let id = own.node_id;
    if nodes.contains(&id) {
        return Decision::Refuse(format!(
            "cluster {cluster_id} knows a node {id} already, and this data directory is empty; restore the directory of node \
             {id}, or, if that is lost, start with a --node-id that was never used and then run `flumen cluster decommission {id}`"
        ));
    }
    if let Some(founder) = founders.iter().find(|f| f.node_id == id) {
        let may_have_lost_its_votes = match standing {
            Standing::Current => false,
            Standing::Known => true,
            Standing::New => !all_answer,
        };
        if may_have_lost_its_votes {
            return Decision::Wait(format!(
                "this directory is empty, and no broker that answers can tell yet whether cluster {cluster_id} knows a node {id}; \
                 a majority of its brokers has to run"
            ));
        }
        return match own_address {
            Some(address) if *address == founder.address => Decision::Adopt {
                cluster_id: cluster_id.to_string(),
                founders: founders.to_vec(),
                address: address.clone(),
            },
            _ => Decision::Refuse(format!(
                "cluster {cluster_id} was formed with node {id} at {}; start there, or with a --node-id that was never used",
                founder.address
            )),
        };
    }
    if let Some(founder) = founders.iter().find(|f| Some(&f.address) == own_address)
        && !nodes.contains(&founder.node_id)
    {
        return Decision::Refuse(format!(
            "cluster {cluster_id} was formed with node {} at {}, which has not come yet; start this one with --node-id {}",
            founder.node_id, founder.address, founder.node_id
        ));
    }
    Decision::Join { cluster_id: cluster_id.to_string(), founders: founders.to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "AAAAAAAAAAAAAAAAAAAAAA";

    fn seeds(names: &str) -> Vec<String> {
        names.chars().map(|c| format!("{c}:1")).collect()
    }

    fn empty(node_id: i32, boot_id: u64) -> Presence {
        Presence {
            node_id,
            boot_id,
            seeds: seeds("abc"),
            state: State::Empty,
            waits: None,
            clock_ms: 1_000_000,
        }
    }

    fn founders() -> Vec<Founder> {
        (1..).zip(seeds("abc")).map(|(node_id, address)| Founder { node_id, address }).collect()
    }

    fn member(node_id: i32, boot_id: u64, nodes: &[i32]) -> Presence {
        let standing = if nodes.is_empty() { Standing::New } else { Standing::Current };
        member_of(node_id, boot_id, nodes, standing)
    }

    fn member_of(node_id: i32, boot_id: u64, nodes: &[i32], standing: Standing) -> Presence {
        let nodes = nodes.to_vec();
        let state = State::Member { cluster_id: ID.into(), founders: founders(), nodes, standing };
        Presence { state, ..empty(node_id, boot_id) }
    }

    /// Regression: members that had just started knew no nodes yet, and a founder whose disk was lost took its part again.
    #[test]
    fn a_founder_that_lost_its_disk_does_not_vote_again() {
        let own = empty(3, 30);
        let waits = |answers: &[Option<Presence>]| matches!(decide(&own, answers), Decision::Wait(_));
        let adopts = |answers: &[Option<Presence>]| matches!(decide(&own, answers), Decision::Adopt { .. });
        let this = || Some(own.clone());
        // They have started again and have no majority, with this one's vote or without.
        for nodes in [&[][..], &[1, 2]] {
            let known = |id, boot| Some(member_of(id, boot, nodes, Standing::Known));
            assert!(waits(&[known(1, 10), None, this()]));
            assert!(waits(&[known(1, 10), known(2, 20), this()]));
            assert!(waits(&[Some(member(1, 10, &[])), known(2, 20), this()]));
        }
        let known = [Some(member_of(1, 10, &[1, 2, 3], Standing::Known)), None, this()];
        assert!(refusal(&own, &known).contains("decommission 3"));
        // One that was never confirmed does not know what the third, which is silent, may have acknowledged with this one.
        assert!(waits(&[Some(member(1, 10, &[])), None, this()]));
        assert!(adopts(&[Some(member(1, 10, &[])), Some(empty(2, 20)), this()]));
        assert!(adopts(&[Some(member(1, 10, &[])), Some(member(2, 20, &[])), this()]));
        // It never came.
        assert!(adopts(&[Some(member(1, 10, &[1, 2])), None, this()]));
        let mixed = [Some(member_of(1, 10, &[], Standing::Known)), Some(member(2, 20, &[1, 2])), this()];
        assert!(adopts(&mixed));
    }

    #[test]
    fn a_clock_far_from_most_others_is_refused() {
        let at = |presence: Presence, clock_ms| Presence { clock_ms, ..presence };
        let own = at(empty(3, 30), 3_600_000);
        let answers = |one, other| {
            [Some(at(member(1, 10, &[1, 2]), one)), Some(at(empty(2, 20), other)), Some(own.clone())]
        };
        assert!(refusal(&own, &answers(1, 1)).contains("3599 s ahead of that of the broker at a:1"));
        assert!(refusal(&own, &answers(7_200_000, 7_300_000)).contains("3600 s behind"));
        let joins = |one, other| !matches!(decide(&own, &answers(one, other)), Decision::Refuse(_));
        assert!(joins(3_600_000 - CLOCKS_APART_MAX_MS, 3_600_000));
        assert!(joins(3_600_000, 1), "it is the other one's");
        assert!(joins(0, 0), "nothing is known");
    }

    fn all() -> [Option<Presence>; 3] {
        [Some(empty(1, 10)), Some(empty(2, 20)), Some(empty(3, 30))]
    }

    fn refusal(own: &Presence, answers: &[Option<Presence>]) -> String {
        match decide(own, answers) {
            Decision::Refuse(sentence) => sentence,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_lowest_founds_when_all_have_answered_and_the_others_follow() {
        assert_eq!(decide(&empty(1, 10), &all()), Decision::Found(founders()));
        for (id, boot) in [(2, 20), (3, 30)] {
            assert!(matches!(decide(&empty(id, boot), &all()), Decision::Wait(_)));
        }
        let founded = [Some(member(1, 10, &[])), Some(empty(2, 20)), Some(empty(3, 30))];
        assert_eq!(
            decide(&empty(2, 20), &founded),
            Decision::Adopt { cluster_id: ID.into(), founders: founders(), address: "b:1".into() }
        );
        // Late, when the others have gone on without it.
        let running = [Some(member(1, 10, &[1, 2])), Some(member(2, 20, &[1, 2])), Some(empty(3, 30))];
        assert!(matches!(decide(&empty(3, 30), &running), Decision::Adopt { .. }));
    }

    #[test]
    fn nothing_is_founded_while_a_seed_is_silent_or_has_another_list() {
        for missing in 0..3 {
            let mut answers = all();
            answers[missing] = None;
            assert!(matches!(decide(&empty(1, 10), &answers), Decision::Wait(_)), "{missing}");
        }
        let mut answers = all();
        answers[2].as_mut().unwrap().seeds = seeds("ab");
        assert!(refusal(&empty(1, 10), &answers).contains("--seeds a:1,b:1,"));
        answers[2].as_mut().unwrap().seeds = seeds("cba");
        assert!(matches!(decide(&empty(1, 10), &answers), Decision::Found(_)), "the order is no matter");
    }

    #[test]
    fn one_seed_is_a_cluster_of_one() {
        let own = Presence { seeds: seeds("a"), ..empty(4, 40) };
        assert_eq!(
            decide(&own, &[Some(own.clone())]),
            Decision::Found(vec![Founder { node_id: 4, address: "a:1".into() }])
        );
        assert!(matches!(decide(&own, &[None]), Decision::Wait(_)), "it must find itself first");
    }

    #[test]
    fn who_is_no_seed_joins_what_there_is_and_founds_nothing() {
        let running = [None, Some(member(2, 20, &[1, 2, 3])), None];
        assert_eq!(
            decide(&empty(4, 40), &running),
            Decision::Join { cluster_id: ID.into(), founders: founders() }
        );
        assert!(matches!(decide(&empty(4, 40), &all()), Decision::Wait(_)));
        assert!(matches!(decide(&empty(4, 40), &[None, None, None]), Decision::Wait(_)));
    }

    #[test]
    fn an_id_is_used_once() {
        let mut twins = all();
        twins[1].as_mut().unwrap().node_id = 1;
        assert!(refusal(&empty(1, 10), &twins).contains("b:1"));
        // Of two others, too.
        let mut twins = all();
        twins[1].as_mut().unwrap().node_id = 3;
        assert!(refusal(&empty(1, 10), &twins).contains("--node-id"));
        // An empty directory under an id that the cluster knows: the disk was lost, or the id belongs to somebody.
        let running = [Some(member(1, 10, &[1, 2, 3])), None, Some(empty(3, 30))];
        assert!(refusal(&empty(3, 30), &running).contains("restore the directory of node 3"));
        // A founder of that id is expected elsewhere.
        let running = [Some(member(1, 10, &[1, 2])), None, None];
        assert!(refusal(&empty(3, 30), &running).contains("node 3 at c:1"));
        let running = [Some(member(1, 10, &[1, 2])), None, Some(empty(9, 90))];
        assert!(refusal(&empty(9, 90), &running).contains("--node-id 3"));
    }

    #[test]
    fn two_clusters_behind_one_list_are_refused() {
        let mut other = member(3, 30, &[3]);
        if let State::Member { cluster_id, .. } = &mut other.state {
            *cluster_id = "BAAAAAAAAAAAAAAAAAAAAA".into();
        }
        let mixed = [Some(member(1, 10, &[1])), None, Some(other)];
        assert!(refusal(&empty(4, 40), &mixed).contains("different clusters"));
    }

    #[test]
    fn a_list_of_seeds_is_judged_before_anybody_is_asked() {
        let check = |list: &[&str]| check_seeds(&list.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        assert_eq!(check(&["a:1", "b.example:33145", "[::1]:5"]), Ok(()));
        assert!(check(&[]).is_err());
        assert!(check(&["a:1", "a:1"]).unwrap_err().contains("twice"));
        assert!(check(&["a:1", "b:1", "c:1", "d:1", "e:1", "f:1"]).is_err());
        for bad in ["a", "a:", ":1", "a:0", "a:x", "a:70000", "a b:1"] {
            assert!(check(&[bad]).unwrap_err().contains("HOST:PORT"), "{bad}");
        }
    }
}
