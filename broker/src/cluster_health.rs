//! What is wrong with this node, in sentences that say what to do. The cluster as a whole is in `cluster_view`.
//!
//! The judgement is a pure function of what was looked at (`judge`); looking goes to gauges, the image and, for the reason
//! of a damage, to the partition's shard. A problem of severity `error` makes the cluster unhealthy; a `warning` mends
//! itself. It keeps no history and mends nothing.

use std::sync::atomic::Ordering;

use flumen_sink::status::State;
use serde_json::{Value, json};

use crate::cluster::bootstrap::apart_in_words;
use crate::controller::METADATA_GROUP;
use crate::node::Node;
use crate::waits::Wait;

/// Partitions that are named one by one; of a lost disk the first tell as much as all.
const DAMAGED_NAMED_MAX: usize = 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub code: &'static str,
    pub severity: Severity,
    pub node_id: i32,
    /// What it is about: a partition, an export, a directory.
    pub subject: String,
    pub detail: String,
    pub impact: String,
    pub fix: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Error,
    Warning,
}

impl Problem {
    pub fn document(&self) -> Value {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        json!({
            "code": self.code, "severity": severity, "node_id": self.node_id, "subject": self.subject,
            "detail": self.detail, "impact": self.impact, "fix": self.fix,
        })
    }
}

/// What one node knows of itself.
#[derive(Debug, Default)]
struct Seen {
    node_id: i32,
    data_dir: String,
    free_bytes: u64,
    disk_is_low: bool,
    /// The node does not serve yet.
    waits: Option<Wait>,
    metadata_damage: Option<String>,
    damaged: Vec<Damaged>,
    exports: Vec<Export>,
}

#[derive(Debug)]
struct Damaged {
    topic: String,
    partition: i32,
    reason: String,
}

#[derive(Debug)]
struct Export {
    topic: String,
    state: State,
    reason: String,
    fix: Option<String>,
}

async fn damage_of(node: &Node, group_id: u64) -> Option<String> {
    if node.gauges_of(group_id).damaged.load(Ordering::Relaxed) == 0 {
        return None;
    }
    let home = &node.shards[node.shard_of(group_id)];
    let reason = home.run(move |shard| async move {
        shard.partition(group_id).and_then(|p| p.damage().map(str::to_string))
    });
    Some(reason.await.ok().flatten().unwrap_or_else(|| "see the broker's log".to_string()))
}

/// Leaders of other topics go on whatever happens to these.
async fn look(node: &Node) -> Seen {
    let image = node.image.load_full();
    let mut damaged = Vec::new();
    for topic in image.topics.values() {
        for (index, info) in (0..).zip(&topic.partitions) {
            if let Some(reason) = damage_of(node, info.group_id).await {
                damaged.push(Damaged { topic: topic.name.clone(), partition: index, reason });
            }
        }
    }
    let exports = node.exports.views().into_iter().map(|(topic, view)| {
        let status = &view.status;
        let error = status.last_error.as_ref();
        Export {
            topic,
            state: status.state,
            reason: error.map_or_else(|| status.reason.clone(), |e| e.message.clone()),
            fix: error.map(|e| e.hint.clone()).filter(|hint| !hint.is_empty()),
        }
    });
    Seen {
        node_id: image.node.id,
        data_dir: node.data_dir.display().to_string(),
        free_bytes: node.disk.free_bytes(),
        disk_is_low: node.disk.is_low(),
        waits: node.waits.get(),
        metadata_damage: damage_of(node, METADATA_GROUP).await,
        damaged,
        exports: exports.collect(),
    }
}

/// A node that runs, and waits for something before it serves.
pub fn not_serving(node_id: i32, wait: &Wait) -> Problem {
    Problem {
        code: "NODE_NOT_SERVING",
        severity: Severity::Error,
        node_id,
        subject: format!("node {node_id}"),
        detail: format!("node {node_id} runs and does not serve yet: {}", wait.detail),
        impact: "its replicas are not kept up to date, and clients cannot use it".to_string(),
        fix: wait.fix.clone(),
    }
}

/// `ahead_ms`: how far the clock of `node_id` is ahead of that of `asked_id`.
pub fn clocks_apart(node_id: i32, asked_id: i32, ahead_ms: i64) -> Problem {
    let apart = apart_in_words(ahead_ms);
    Problem {
        code: "CLOCKS_APART",
        severity: Severity::Error,
        node_id,
        subject: format!("the clock of node {node_id}"),
        detail: format!("the clock of node {node_id} is {apart} that of node {asked_id}"),
        impact: "retention by time, searches by time and the times that brokers give to records go wrong"
            .to_string(),
        fix: "set the clocks of both machines right (chrony, systemd-timesyncd)".to_string(),
    }
}

fn judge(seen: &Seen) -> Vec<Problem> {
    let node_id = seen.node_id;
    let mut problems = Vec::new();
    problems.extend(seen.waits.as_ref().map(|wait| not_serving(node_id, wait)));
    if let Some(reason) = &seen.metadata_damage {
        problems.push(Problem {
            code: "METADATA_DAMAGED",
            severity: Severity::Error,
            node_id,
            subject: "the metadata".to_string(),
            detail: format!("the metadata log of this node is damaged: {reason}"),
            impact: "it neither votes about the metadata nor learns of changes; partitions that it serves go on".to_string(),
            fix: "none is needed where a majority of the nodes that vote about the metadata runs without this one: it gets its log \
                  from them. Otherwise restore __cluster_metadata-0 from a copy"
                .to_string(),
        });
    }
    if seen.disk_is_low {
        problems.push(Problem {
            code: "DISK_FULL",
            severity: Severity::Error,
            node_id,
            subject: seen.data_dir.clone(),
            detail: format!("{} MiB are free where {} is", seen.free_bytes >> 20, seen.data_dir),
            impact: "this node leads nothing that another node with room can lead; producers of the rest get \
                     KAFKA_STORAGE_ERROR and try again; reads, deletion, retention and exports go on"
                .to_string(),
            fix: "free space there, delete a topic (flumen topic delete NAME) or keep less (flumen topic alter NAME -c \
                  retention.ms=...); producers go on by themselves"
                .to_string(),
        });
    }
    for found in seen.damaged.iter().take(DAMAGED_NAMED_MAX) {
        let place = format!("{}-{}", found.topic, found.partition);
        problems.push(Problem {
            code: "PARTITION_DAMAGED",
            severity: Severity::Error,
            node_id,
            detail: format!("the log of {place} is damaged: {}", found.reason),
            impact: format!("{place} refuses to serve, its bytes are left alone; other partitions go on"),
            fix: format!(
                "none is needed where a majority of its other replicas runs: it gets its log from them. Otherwise stop the broker, \
                 see what is damaged with flumen debug log verify {}, and restore the directory of {place} from a copy; or give \
                 the records up with flumen topic delete {}",
                seen.data_dir, found.topic
            ),
            subject: place,
        });
    }
    if let Some(more) = seen.damaged.len().checked_sub(DAMAGED_NAMED_MAX).filter(|n| *n > 0) {
        problems.push(Problem {
            code: "PARTITION_DAMAGED",
            severity: Severity::Error,
            node_id,
            subject: seen.data_dir.clone(),
            detail: format!("{more} more partitions are damaged"),
            impact: "they refuse to serve".to_string(),
            fix: "flumen cluster partitions --unhealthy lists them all".to_string(),
        });
    }
    for export in &seen.exports {
        let topic = &export.topic;
        let (code, severity, impact) = match export.state {
            State::Failed => (
                "EXPORT_FAILED",
                Severity::Error,
                "no rows reach ClickHouse until somebody acts; the log keeps what is not exported",
            ),
            State::BackingOff => (
                "EXPORT_WAITS",
                Severity::Warning,
                "rows reach ClickHouse later; it is tried again by itself and the log keeps what is not exported",
            ),
            State::Starting | State::Running | State::Paused | State::Stopped => continue,
        };
        let fix = match &export.fix {
            Some(fix) => format!("{fix}; flumen export status {topic} tells more"),
            None => format!("flumen export status {topic} tells more; then flumen export resume {topic}"),
        };
        problems.push(Problem {
            code,
            severity,
            node_id,
            subject: format!("export of {topic}"),
            detail: export.reason.clone(),
            impact: impact.to_string(),
            fix,
        });
    }
    problems
}

/// What this node knows to be wrong with itself.
pub async fn problems(node: &Node) -> Vec<Problem> {
    let mut problems = judge(&look(node).await);
    problems.extend(node.cluster.as_deref().and_then(crate::cluster::rpc_health::problem));
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_problem_says_what_to_do_and_only_errors_count() {
        let export = |topic: &str, state, fix: Option<&str>| Export {
            topic: topic.to_string(),
            state,
            reason: "because".to_string(),
            fix: fix.map(str::to_string),
        };
        let seen = Seen {
            node_id: 1,
            data_dir: "/data".to_string(),
            free_bytes: 100 << 20,
            disk_is_low: true,
            waits: None,
            metadata_damage: None,
            damaged: (0..22)
                .map(|partition| Damaged { topic: "t".into(), partition, reason: "bad checksum".into() })
                .collect(),
            exports: vec![
                export("running", State::Running, None),
                export("paused", State::Paused, None),
                export("failed", State::Failed, Some("fix the password")),
                export("waits", State::BackingOff, None),
            ],
        };
        let problems = judge(&seen);
        let codes: Vec<_> = problems.iter().map(|p| (p.code, p.severity)).collect();
        assert_eq!(codes[0], ("DISK_FULL", Severity::Error));
        assert_eq!(codes.iter().filter(|c| c.0 == "PARTITION_DAMAGED").count(), DAMAGED_NAMED_MAX + 1);
        assert_eq!(
            codes[codes.len() - 2..],
            [("EXPORT_FAILED", Severity::Error), ("EXPORT_WAITS", Severity::Warning)]
        );
        assert!(problems.iter().all(|p| !p.detail.is_empty() && !p.impact.is_empty() && !p.fix.is_empty()));
        assert_eq!(problems[0].detail, "100 MiB are free where /data is");
        assert_eq!(problems[1].subject, "t-0");
        assert!(problems[1].fix.contains("flumen debug log verify /data"));
        assert_eq!(problems[codes.len() - 2].fix, "fix the password; flumen export status failed tells more");
        let waits = Some(Wait { detail: "it reads its logs".into(), fix: "wait".into() });
        let metadata_damage = Some("bad checksum".to_string());
        let found = judge(&Seen { node_id: 3, waits, metadata_damage, ..Seen::default() });
        assert_eq!(
            found.iter().map(|p| p.code).collect::<Vec<_>>(),
            ["NODE_NOT_SERVING", "METADATA_DAMAGED"]
        );
        assert_eq!(found[0].detail, "node 3 runs and does not serve yet: it reads its logs");
        assert_eq!((found[0].node_id, found[0].fix.as_str()), (3, "wait"));
        assert!(
            judge(&Seen { exports: vec![export("r", State::Running, None)], ..Seen::default() }).is_empty()
        );
    }
}
