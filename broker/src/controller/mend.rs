//! The metadata log of this node is damaged, and the others have it: it is replaced, under the id that the node has.
//!
//! Found at start, before anything is opened, or by a reader later. The others are told until the leader of the metadata has taken
//! this node's vote away (`cluster::mending`); then the log goes, a new one joins, and the image comes from that leader, also when
//! the node dies before it has come (`MetadataSnapshots::begin_anew`). A node
//! whose log is being replaced serves its partitions if it did before, and decides nothing about the metadata. Without a majority
//! of the others nothing goes, and it waits. A broker that runs alone has nobody to ask, and does not start.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Controller, METADATA_GROUP, METADATA_TOPIC, spec_of_metadata};
use crate::cluster::mending;

/// Between two questions, and between two looks: a step takes some round trips.
const INTERVAL: Duration = Duration::from_millis(500);
/// Whoever waits says so again.
const TELL_INTERVAL: Duration = Duration::from_secs(30);

impl Controller {
    /// Returns with a new log in place of the damaged one.
    pub(super) async fn mend_log(&self) -> Result<(), String> {
        let (node, shard) = (&self.shard.node, &self.shard);
        let reason = self.log().damage().unwrap_or_default().to_string();
        let restore = || {
            format!(
                "the metadata log is damaged ({reason}); restore {METADATA_TOPIC}-0 from a copy before starting"
            )
        };
        // One that was never confirmed may be any founder's; its directory is not known to anybody.
        let cluster = node.cluster.as_ref().filter(|cluster| cluster.identity.registered);
        let cluster = cluster.ok_or_else(restore)?;
        let addresses = self.addresses(cluster);
        if addresses.is_empty() {
            return Err(restore());
        }
        self.log().cease_if_damaged();
        shard.links.set(shard, &addresses);
        node.waits.say(
            format!("its metadata log is damaged ({reason}), and it waits for the others to take its vote about the metadata and send it the log"),
            format!(
                "start the nodes that are down: a majority of those that vote about the metadata has to run without this one; where \
                 there is none, restore {METADATA_TOPIC}-0 from a copy"
            ),
        );
        let mut told: Option<Instant> = None;
        while !mending::may_metadata_begin_again(shard, cluster.identity.directory_id).await {
            if let Some(sentence) = shard.links.refusal() {
                return Err(sentence);
            }
            if told.is_none_or(|at| at.elapsed() >= TELL_INTERVAL) {
                told = Some(Instant::now());
                tracing::warn!(
                    reason,
                    "the metadata log of this node is damaged; it waits for the others to take its vote about the metadata, and gets \
                     the log from them. A majority of those who vote has to run without it; where there is none, restore the log \
                     from a copy"
                );
            }
            tokio::time::sleep(INTERVAL).await;
        }
        let snapshots = self.snapshots.clone();
        let noted = tokio::task::spawn_blocking(move || snapshots.begin_anew()).await;
        noted.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        tracing::warn!(
            reason,
            "the damaged metadata log goes; this node joins the metadata with an empty one"
        );
        while let Err(error) = shard.renew(spec_of_metadata(node)).await {
            tracing::error!(%error, "cannot create the metadata log; it is tried again");
            tokio::time::sleep(INTERVAL).await;
        }
        self.log.replace(shard.partition(METADATA_GROUP).expect("renewed, and nobody else removes it"));
        Ok(())
    }

    /// Looks whether a reader found damage since the start.
    pub(super) async fn keep_log_whole(self: Rc<Self>) {
        while !self.shard.is_stopping() {
            tokio::time::sleep(INTERVAL).await;
            if self.log().damage().is_none() {
                continue;
            }
            if let Err(error) = self.mend_log().await {
                return self.shard.poison(&error);
            }
        }
    }
}
