//! Whether an export with given settings may run: asked of ClickHouse before anything is changed.
//!
//! Runs on the export thread. It judges, it does not change: what is refused here was never written to the metadata.
//! A server that does not answer refuses nothing; the export then starts and waits for it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flumen_protocol::record::decode_records;
use flumen_protocol::record_batch;
use flumen_sink::admission::{self, Admission};
use flumen_sink::client::{CallKind, ClickHouse};
use flumen_sink::config::ExportConfig;

use super::manager::endpoint;
use crate::node::Node;

/// Longer than a busy server needs for a handful of look-ups, shorter than a Kafka client waits for its answer.
const ADMIT_MAX: Duration = Duration::from_secs(10);
const AWAY_FIX: &str = "check that ClickHouse runs there and that the URL is right; nothing was changed";
/// Records looked at when the columns of a table have to be guessed.
const SAMPLE_RECORDS: usize = 100;
const SAMPLE_BYTES: usize = 256 << 10;
/// A batch of samples may grow to this when decompressed.
const SAMPLE_BATCH_BYTES_MAX: usize = 16 << 20;

/// Why an export with these settings would not run, and what to do.
#[derive(Clone, Debug)]
pub enum NotAdmitted {
    /// The settings by themselves.
    Settings { message: String, fix: Option<String> },
    /// The table cannot give what is asked for.
    Table { reasons: Vec<String>, fixes: Vec<String> },
    /// ClickHouse answered with an error.
    Answer { message: String, fix: String },
    /// ClickHouse did not answer.
    Away { message: String, fix: String },
}

impl NotAdmitted {
    /// One sentence: what happened and what to do.
    pub fn sentence(&self) -> String {
        match self {
            NotAdmitted::Settings { message, fix: None } => message.clone(),
            NotAdmitted::Table { reasons, .. } => reasons.join("; "),
            NotAdmitted::Settings { message, fix: Some(fix) }
            | NotAdmitted::Answer { message, fix }
            | NotAdmitted::Away { message, fix } => format!("{message}; {fix}"),
        }
    }
}

pub(super) async fn admit(
    node: &Arc<Node>,
    topic: &str,
    configs: &BTreeMap<String, String>,
) -> Result<Admission, NotAdmitted> {
    let settings = |message: String, fix| NotAdmitted::Settings { message, fix };
    let config = ExportConfig::from_topic(topic, configs)
        .map_err(|e| settings(e.to_string(), None))?
        .ok_or_else(|| settings("the export is not enabled".to_string(), None))?;
    let endpoint = endpoint(node, &config).map_err(|(message, fix)| settings(message, Some(fix)))?;
    let database = config.database.clone().unwrap_or_else(|| endpoint.database.clone());
    let samples = samples(node, topic).await;
    let samples: Vec<&[u8]> = samples.iter().map(AsRef::as_ref).collect();
    let server = ClickHouse::new(&endpoint);
    let asked = admission::admit(&server, &database, &config, &samples);
    let admission = match tokio::time::timeout(ADMIT_MAX, asked).await {
        Ok(Ok(admission)) => admission,
        Ok(Err(error)) => {
            let message = error.to_string();
            return Err(match error.kind {
                CallKind::Exception | CallKind::Request => {
                    // There is no export yet that could be resumed.
                    let fix = error.hint().trim_end_matches(", then resume the export").to_string();
                    NotAdmitted::Answer { message, fix }
                }
                _ => NotAdmitted::Away { message, fix: AWAY_FIX.to_string() },
            });
        }
        Err(_) => {
            return Err(NotAdmitted::Away {
                message: format!("{} did not answer within {} s", endpoint.shown(), ADMIT_MAX.as_secs()),
                fix: AWAY_FIX.to_string(),
            });
        }
    };
    match admission.admitted {
        true => Ok(admission),
        false => Err(NotAdmitted::Table { reasons: admission.reasons, fixes: admission.fixes }),
    }
}

/// Values of the first records of a topic.
async fn samples(node: &Arc<Node>, topic: &str) -> Vec<Bytes> {
    let groups: Vec<u64> = {
        let image = node.image.load();
        image.topics.get(topic).map_or_else(Vec::new, |t| t.partitions.iter().map(|p| p.group_id).collect())
    };
    let mut out = Vec::new();
    for group_id in groups {
        let read = node.shards[node.shard_of(group_id)]
            .run(move |s| async move {
                let partition = s.partition(group_id)?;
                partition.fetch(partition.log_start_offset(), SAMPLE_BYTES).await.ok()
            })
            .await;
        let Ok(Some(slice)) = read else { continue };
        for batch in slice.records.iter().flat_map(|b| record_batch::batches(b)).flatten() {
            let mut scratch = Vec::new();
            let Ok(records) = decode_records(batch.1, &mut scratch, SAMPLE_BATCH_BYTES_MAX) else { continue };
            out.extend(records.flatten().filter_map(|r| r.value.map(Bytes::copy_from_slice)));
            if out.len() >= SAMPLE_RECORDS {
                out.truncate(SAMPLE_RECORDS);
                return out;
            }
        }
    }
    out
}
