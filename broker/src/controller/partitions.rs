//! Makes the shards of this node match the image: which partitions are open here, with which configuration.
//!
//! A partition is opened when the image names this node as a holder, from what recovery found or anew, and deleted when the
//! image says that this node holds it no longer. Nothing is deleted because the image does not name it: it may be old.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;

use flumen_metadata::{Applied, MetadataImage, Topic};
use flumen_storage::RecoveredGroup;

use super::{Controller, METADATA_GROUP, RecoveredGroups};
use crate::cluster::Cluster;
use crate::partition::PartitionSpec;
use crate::shard::Shard;

/// Whether retention has to wait for ClickHouse.
fn is_exported(topic: &Topic) -> bool {
    topic.configs.get("flumen.clickhouse.enable").is_some_and(|v| v == "true")
}

fn spec_of(topic: &Topic, name: &Arc<str>, index: i32) -> Option<PartitionSpec> {
    let info = topic.partition(index)?;
    Some(PartitionSpec {
        topic: name.clone(),
        index,
        group_id: info.group_id,
        config: topic.effective.clone(),
        replicas: info.replicas.clone(),
        exported: is_exported(topic),
    })
}

/// What is known of the logs that are on this disk, or were.
#[derive(Clone)]
struct Logs {
    recovered: RecoveredGroups,
    held: Arc<BTreeSet<u64>>,
}

/// From what recovery found, or anew: a crash may have come between the metadata and the log. One that was here and is gone
/// comes as a new replica.
fn open(shard: &Rc<Shard>, mut spec: PartitionSpec, logs: &Logs) -> Result<(), String> {
    if shard.partition(spec.group_id).is_some() {
        return Ok(());
    }
    let found = logs.recovered.lock().expect("no panic under this lock").remove(&spec.group_id);
    if let Some(group) = found {
        shard.attach(spec, group);
        return Ok(());
    }
    let own = shard.node.config.node_id;
    if logs.held.contains(&spec.group_id) {
        let (topic, partition) = (&spec.topic, spec.index);
        if spec.replicas.iter().any(|id| *id != own) {
            tracing::error!(%topic, partition, "the log of this replica is gone; it does not vote before it has it again from the others");
            spec.replicas.retain(|id| *id != own);
        } else {
            tracing::error!(%topic, partition, "the log of this partition is gone, and there is no other replica; it begins empty");
        }
    }
    shard.create(spec).map_err(|e| e.to_string())?;
    Ok(())
}

/// Opens every partition of the image that this node holds and that lives on this shard.
fn open_on(shard: &Rc<Shard>, image: &MetadataImage, logs: &Logs) -> Result<(), String> {
    let own = shard.node.config.node_id;
    for topic in image.topics.values() {
        let name: Arc<str> = topic.name.as_str().into();
        for (index, info) in (0i32..).zip(&topic.partitions) {
            if shard.node.shard_of(info.group_id) == shard.id
                && info.is_held_by(own)
                && let Some(spec) = spec_of(topic, &name, index)
            {
                open(shard, spec, logs)?;
            }
        }
    }
    Ok(())
}

impl Controller {
    fn logs(&self) -> Logs {
        Logs { recovered: self.recovered.clone(), held: self.held.borrow().clone() }
    }

    pub(super) async fn open_all(&self) -> Result<(), String> {
        for shard in &self.shard.node.shards {
            let (image, logs) = (self.shard.node.image.load_full(), self.logs());
            let opened = shard.run(move |s| async move { open_on(&s, &image, &logs) }).await;
            opened.map_err(|e| e.to_string())??;
        }
        self.set_links().await;
        Ok(())
    }

    /// After the image was replaced as a whole: opens what is missing, deletes what is of no topic any more or has gone to
    /// other nodes, and configures what stays.
    pub(super) async fn match_image(&self) {
        let _hands_on = self.hands_on.lock().await;
        if let Err(error) = self.open_all().await {
            tracing::error!(error, "cannot open all partitions; the next start tries again");
        }
        let image = self.shard.node.image.load_full();
        let own = self.shard.node.config.node_id;
        let held: Arc<BTreeSet<u64>> = Arc::new(
            image
                .topics
                .values()
                .flat_map(|t| &t.partitions)
                .filter(|info| info.is_held_by(own))
                .map(|info| info.group_id)
                .collect(),
        );
        for shard in &self.shard.node.shards {
            let (image, held) = (image.clone(), held.clone());
            let _ = shard
                .run(move |s| async move {
                    for partition in s.partitions() {
                        let id = partition.group_id;
                        if id != METADATA_GROUP && id < image.next_group_id && !held.contains(&id) {
                            s.delete(id).await;
                        } else if let Some(topic) = image.topics.get(&*partition.topic) {
                            partition.set_config(topic.effective.clone(), is_exported(topic));
                        }
                    }
                })
                .await;
        }
    }

    /// Makes the shards match what a change brought.
    pub(super) async fn make_so(&self, change: &Applied) {
        let node = &self.shard.node;
        let own = node.config.node_id;
        for created in change.created.iter().filter(|c| c.replicas.contains(&own)) {
            self.open_one(&created.topic, created.partition).await;
        }
        for moved in &change.moved {
            if moved.holders.contains(&own) {
                self.open_one(&moved.topic, moved.partition).await;
            } else {
                self.delete_one(moved.group_id).await;
            }
        }
        for deleted in &change.deleted {
            self.delete_one(deleted.group_id).await;
            node.leaders.forget(deleted.group_id);
        }
        let mut deleted: Vec<&str> = change.deleted.iter().map(|d| d.topic.as_str()).collect();
        deleted.dedup();
        for topic in deleted {
            for shard in &node.shards {
                let topic = topic.to_string();
                let _ = shard.run(move |s| async move { s.coordinators.remove_topic(&topic).await }).await;
            }
        }
        for name in &change.topics_reconfigured {
            let found = self.image.borrow().topics.get(name).cloned();
            if let Some(topic) = found {
                self.configure(&topic).await;
            }
        }
        if change.nodes_changed {
            self.set_links().await;
        }
    }

    async fn configure(&self, topic: &Topic) {
        let node = &self.shard.node;
        for info in topic.partitions.iter().filter(|info| info.is_held_by(node.config.node_id)) {
            let (group_id, config, exported) = (info.group_id, topic.effective.clone(), is_exported(topic));
            let _ = node.shards[node.shard_of(group_id)]
                .run(move |s| async move {
                    if let Some(partition) = s.partition(group_id) {
                        partition.set_config(config, exported);
                    }
                })
                .await;
        }
    }

    fn spec(&self, topic: &str, index: i32) -> Option<PartitionSpec> {
        let image = self.image.borrow();
        let topic = image.topics.get(topic)?;
        spec_of(topic, &topic.name.as_str().into(), index)
    }

    async fn open_one(&self, topic: &str, index: i32) {
        let node = &self.shard.node;
        let Some(spec) = self.spec(topic, index) else { return };
        let logs = self.logs();
        let made = node.shards[node.shard_of(spec.group_id)]
            .run(move |s| async move { open(&s, spec, &logs) })
            .await;
        if let Ok(Err(error)) = made {
            // The metadata says that the partition is here; the next start creates it.
            tracing::error!(topic, partition = index, error, "cannot create the partition's log");
        }
    }

    /// The replica here begins again, with an empty log; see `cluster::mending`.
    pub async fn renew(&self, topic: &str, index: i32) {
        let _hands_on = self.hands_on.lock().await;
        let node = &self.shard.node;
        let is_held = {
            let image = self.image.borrow();
            let info = image.topics.get(topic).and_then(|topic| topic.partition(index));
            info.is_some_and(|info| info.is_held_by(node.config.node_id))
        };
        let Some(spec) = self.spec(topic, index).filter(|_| is_held) else { return };
        let home = &node.shards[node.shard_of(spec.group_id)];
        let renewed = home.run(move |s| async move { s.renew(spec).await }).await;
        if let Ok(Err(error)) = renewed {
            tracing::error!(topic, partition = index, %error, "cannot create the partition's log; it is tried again");
        }
    }

    async fn delete_one(&self, group_id: u64) {
        let node = &self.shard.node;
        let _ =
            node.shards[node.shard_of(group_id)].run(move |s| async move { s.delete(group_id).await }).await;
    }

    /// Where the other nodes are.
    pub(super) fn addresses(&self, cluster: &Cluster) -> BTreeMap<i32, String> {
        let mut addresses = cluster.addresses(&self.image.borrow());
        if self.applied.get() < 0 {
            addresses.extend(self.lately_at.clone());
        }
        addresses
    }

    /// Every shard speaks to the nodes that the image names.
    async fn set_links(&self) {
        let node = &self.shard.node;
        let Some(cluster) = &node.cluster else { return };
        let addresses = Arc::new(self.addresses(cluster));
        for shard in &node.shards {
            let addresses = addresses.clone();
            let _ = shard.post(move |shard| shard.links.set(shard, &addresses)).await;
        }
    }

    /// Has what recovery found and the image does not want here removed. Only once the image is known to be no older than
    /// this process: a partition may have been made just before the node died.
    pub async fn drop_orphans(&self, remove: impl Fn(u64, RecoveredGroup) + Send + 'static) {
        let _hands_on = self.hands_on.lock().await;
        let next_group_id = self.image.borrow().next_group_id;
        // Numbers that were not given out yet are those of a log whose name nobody can explain; they stay alone in a cluster.
        let is_old = |id: u64| id < next_group_id || self.shard.node.cluster.is_none();
        let orphans: Vec<(u64, RecoveredGroup)> = {
            let mut recovered = self.recovered.lock().expect("no panic under this lock");
            let ids: Vec<u64> = recovered.keys().copied().filter(|id| is_old(*id)).collect();
            ids.into_iter().filter_map(|id| Some((id, recovered.remove(&id)?))).collect()
        };
        let removed = tokio::task::spawn_blocking(move || {
            orphans.into_iter().for_each(|(id, group)| remove(id, group))
        });
        if let Err(error) = removed.await {
            tracing::warn!(%error, "could not remove old logs; the next start tries again");
        }
    }
}
