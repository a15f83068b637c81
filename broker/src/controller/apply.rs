//! What is committed to the metadata log becomes the image, on every node and in the same order.
//!
//! Follows the high watermark of the metadata group. A node whose log begins behind what it has applied gets the metadata
//! from another node and goes on from there. A record that cannot be read or applied stops the process: the others have
//! applied it, and guessing would make this node another cluster.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use flumen_metadata::{Applied, Command, MetadataImage, decode_snapshot_file};
use flumen_protocol::record;
use flumen_protocol::record_batch;
use flumen_storage::failpoint::{self, Failpoint};
use tokio::time::timeout;

use super::{Controller, METADATA_GROUP};
use crate::cluster::requests::{self, Answered};
use crate::partition::DataWaiter;

/// One read of the metadata log.
const READ_BYTES: usize = 1 << 20;
/// A metadata record is at most this long once decompressed; our own batches are not compressed.
const BATCH_BYTES_MAX: usize = 16 << 20;
/// How often a node of a cluster looks without having been told: its log may have begun anew.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Between two attempts to get the metadata from another node.
const SNAPSHOT_RETRY: Duration = Duration::from_millis(200);

impl Controller {
    /// Applies what is known to be committed, before anything that the image names is opened.
    pub(super) async fn replay(self: &Rc<Self>) -> Result<(), String> {
        while self.applied.get() < self.log().high_watermark() {
            self.apply_next(false).await?;
        }
        Ok(())
    }

    pub(super) async fn follow(self: Rc<Self>) {
        while !self.shard.is_stopping() {
            let waiter = Rc::new(DataWaiter::default());
            self.log().wait_for_data(&waiter);
            if self.applied.get() < self.log().log_start_offset() {
                if let Err(error) = self.begin_from_another().await {
                    tracing::warn!(error, "this node needs the metadata of another; trying again");
                    tokio::time::sleep(SNAPSHOT_RETRY).await;
                }
                continue;
            }
            if self.applied.get() < self.log().high_watermark() {
                if let Err(error) = self.apply_next(true).await {
                    // Deleted under the reader: what replaces it is found in the next round.
                    if self.applied.get() < self.log().log_start_offset() || self.shard.is_stopping() {
                        continue;
                    }
                    if self.log().damage().is_some() && self.shard.node.cluster.is_some() {
                        // It is replaced, and has the same then.
                        tokio::time::sleep(SNAPSHOT_RETRY).await;
                        continue;
                    }
                    return self.shard.poison(&format!("the metadata cannot be followed: {error}"));
                }
                continue;
            }
            if self.shard.node.cluster.is_some() {
                let _ = timeout(LOOK_INTERVAL, waiter.notify.notified()).await;
            } else {
                waiter.notify.notified().await;
            }
        }
    }

    async fn apply_next(self: &Rc<Self>, make_so: bool) -> Result<(), String> {
        let from = self.applied.get();
        let slice = self.log().fetch(from, READ_BYTES).await.map_err(|e| e.to_string())?;
        for bytes in &slice.records {
            for batch in record_batch::batches(bytes) {
                let (header, batch) = batch.map_err(|e| e.to_string())?;
                // A read may begin before what was asked for.
                if header.next_offset() <= self.applied.get() {
                    continue;
                }
                let applied = self.apply_batch(batch)?;
                if make_so {
                    self.publish();
                    let _hands_on = self.hands_on.lock().await;
                    for change in &applied {
                        self.make_so(change).await;
                    }
                    self.shard.node.exports.metadata_changed();
                }
                if let Some(awaited) = self.awaited.borrow_mut().get_mut(&header.base_offset) {
                    *awaited = Some(applied);
                }
                self.applied.set(header.next_offset());
                self.applied_more.notify_waiters();
                if make_so {
                    self.maybe_snapshot();
                }
            }
        }
        if self.applied.get() == from {
            return Err(format!("the metadata log ends at {from} although it should go on"));
        }
        Ok(())
    }

    /// As a whole: the records of a batch are one change.
    fn apply_batch(&self, batch: &[u8]) -> Result<Vec<Applied>, String> {
        let mut scratch = Vec::new();
        let mut applied = Vec::new();
        for record in
            record::decode_records(batch, &mut scratch, BATCH_BYTES_MAX).map_err(|e| e.to_string())?
        {
            let record = record.map_err(|e| e.to_string())?;
            let command = Command::decode(record.value.unwrap_or(&[])).map_err(|e| e.to_string())?;
            let change = self.image.borrow_mut().apply(&command);
            applied
                .push(change.map_err(|e| format!("metadata record {} does not apply: {e}", record.offset))?);
        }
        Ok(applied)
    }

    /// Takes the metadata from a node that has more of it than this one can read: from the one that leads it, as partitions that
    /// older metadata does not have here would be deleted. If that is this one, what another has must reach as far as what is
    /// committed.
    async fn begin_from_another(self: &Rc<Self>) -> Result<(), String> {
        let node = &self.shard.node;
        if failpoint::is_asked(Failpoint::MetadataJoined) {
            while self.log().raft_status().persisted_index == 0 {
                tokio::task::yield_now().await;
            }
            failpoint::pass(Failpoint::MetadataJoined);
        }
        let is_leader = self.log().is_leader();
        if is_leader && !self.leads() {
            return Err("it is not known yet what is committed".to_string());
        }
        let question: &'static [u8] = if is_leader { &[] } else { &[1] };
        let mut others = self.shard.links.connected();
        let leader = node.leaders.get(METADATA_GROUP).map(|(leader, _)| leader);
        others.sort_by_key(|id| Some(*id) != leader);
        let mut given = None;
        for from in others {
            let answered = self.shard.links.ask(from, requests::METADATA, Bytes::from_static(question)).await;
            if let Ok(Answered { code: 0, body }) = answered {
                given = Some((from, body));
                break;
            }
        }
        let (from, file) = given.ok_or("no node that is connected leads it")?;
        let (offset, body) = decode_snapshot_file(&file).map_err(|e| e.to_string())?;
        let log = self.log();
        let needed = if is_leader { log.high_watermark() } else { log.log_start_offset() };
        if offset < needed {
            return Err(format!("what node {from} has ends at {offset}, and {needed} is needed"));
        }
        let own = self.image.borrow().node.clone();
        let image = MetadataImage::restore(own, body)
            .map_err(|e| format!("the metadata of node {from} cannot be read: {e}"))?
            .with_static_configs(&node.config);
        let (snapshots, copy) = (self.snapshots.clone(), image.clone());
        match tokio::task::spawn_blocking(move || snapshots.write(offset, &copy)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error.to_string()),
            Err(error) => return Err(error.to_string()),
        }
        self.snapshot_end.set(offset);
        *self.image.borrow_mut() = image;
        self.publish();
        self.match_image().await;
        node.exports.metadata_changed();
        self.applied.set(offset);
        self.applied_more.notify_waiters();
        tracing::info!(from, offset, "metadata taken from another node");
        Ok(())
    }
}
