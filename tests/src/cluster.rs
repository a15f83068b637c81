//! Several brokers that are one cluster, each a process on loopback, and what must be equal on all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use flumen_protocol::record_batch;
use kafka_protocol::messages::alter_partition_reassignments_request::{
    ReassignablePartition, ReassignableTopic,
};
use kafka_protocol::messages::describe_quorum_request::{PartitionData, TopicData};
use kafka_protocol::messages::{
    AlterPartitionReassignmentsRequest, BrokerId, DescribeQuorumRequest, ListPartitionReassignmentsRequest,
};
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use serde_json::{Value, json};

use crate::flumen::{Flumen, READY};
use crate::kafka::{ends_of, read_all};
use crate::load::Load;
use crate::network::Network;
use crate::process::free_ports;
use crate::wire::{Wire, topic_name};
use crate::witness::{Witness, judge};

pub const METADATA_TOPIC: &str = "__cluster_metadata";
const POLL: Duration = Duration::from_millis(50);
const NODES_MAX: usize = 8;
/// What a cluster that serves takes: so many records, and so many in each partition.
const PROGRESS_RECORDS: usize = 300;
const PROGRESS_RECORDS_EACH: usize = 30;

pub struct Cluster {
    /// Node ids are positions plus one.
    pub nodes: Vec<Flumen>,
    dir: PathBuf,
    pub seeds: String,
    settings: Vec<String>,
}

impl Cluster {
    /// Founds a cluster of so many nodes with empty directories, all at once; returns when all are ready. `{id}` in a setting
    /// stands for the node's id.
    pub fn start(dir: &Path, nodes: usize, settings: &[&str]) -> anyhow::Result<Cluster> {
        Cluster::start_with(dir, nodes, settings, Vec::new())
    }

    pub fn start_with(
        dir: &Path,
        nodes: usize,
        settings: &[&str],
        environment: Vec<(&'static str, String)>,
    ) -> anyhow::Result<Cluster> {
        Cluster::start_in(dir, nodes, settings, environment, None)
    }

    /// Each node in its namespace of a network, if there is one.
    pub fn start_in(
        dir: &Path,
        nodes: usize,
        settings: &[&str],
        environment: Vec<(&'static str, String)>,
        network: Option<&Network>,
    ) -> anyhow::Result<Cluster> {
        Cluster::start_each_in(dir, nodes, settings, |_| environment.clone(), network)
    }

    /// Each with an environment of its own, by its position.
    pub fn start_each_in(
        dir: &Path,
        nodes: usize,
        settings: &[&str],
        environment: impl Fn(usize) -> Vec<(&'static str, String)>,
        network: Option<&Network>,
    ) -> anyhow::Result<Cluster> {
        ensure!(nodes <= NODES_MAX, "{nodes} nodes are more than a test needs");
        let ports = free_ports::<{ 3 * NODES_MAX }>();
        let host = |at| network.map_or_else(|| "127.0.0.1".to_string(), |network| network.address(at));
        let rpc: Vec<String> =
            ports[..nodes].iter().enumerate().map(|(at, port)| format!("{}:{port}", host(at))).collect();
        let mut cluster = Cluster {
            nodes: Vec::new(),
            dir: dir.to_path_buf(),
            seeds: rpc.join(","),
            settings: settings.iter().map(ToString::to_string).collect(),
        };
        for (at, rpc) in rpc.iter().enumerate() {
            let mut node = cluster.idle(at, rpc, ports[NODES_MAX + at], ports[2 * NODES_MAX + at]);
            node.environment = environment(at);
            if let Some(network) = network {
                // Nobody but the nodes is on it, and the test.
                node.arguments.push("--rpc-plaintext".to_string());
                node.move_to(&network.address(at), network.inside(at));
            }
            cluster.nodes.push(node);
        }
        cluster.restart_all()?;
        Ok(cluster)
    }

    /// A broker that runs alone, on the directory that becomes the first node's of `found`.
    pub fn alone(dir: &Path, settings: &[&str]) -> anyhow::Result<Flumen> {
        let [kafka, admin] = free_ports();
        let more = ["--node-id", "1", "--shards", "1"];
        let mut broker = Flumen::idle_at(&dir.join("n1"), kafka, admin, settings, &more);
        broker.restart()?;
        Ok(broker)
    }

    /// What is in the first node's directory, as a cluster of that node.
    pub fn found(dir: &Path, settings: &[&str]) -> anyhow::Result<Cluster> {
        let [rpc, kafka, admin] = free_ports();
        let rpc = format!("127.0.0.1:{rpc}");
        let settings = settings.iter().map(ToString::to_string).collect();
        let mut cluster = Cluster { nodes: Vec::new(), dir: dir.to_path_buf(), seeds: rpc.clone(), settings };
        let mut node = cluster.idle(0, &rpc, kafka, admin);
        node.restart()?;
        cluster.nodes.push(node);
        Ok(cluster)
    }

    fn idle(&self, at: usize, rpc: &str, kafka: u16, admin: u16) -> Flumen {
        let id = (at + 1).to_string();
        let more = ["--node-id", &id, "--rpc", rpc, "--seeds", &self.seeds, "--shards", "1"];
        let settings: Vec<String> = self.settings.iter().map(|s| s.replace("{id}", &id)).collect();
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        Flumen::idle_at(&self.dir.join(format!("n{id}")), kafka, admin, &settings, &more)
    }

    /// One more node, which joins; its position.
    pub fn add(&mut self) -> anyhow::Result<usize> {
        let at = self.nodes.len();
        let [rpc, kafka, admin] = free_ports();
        let mut node = self.idle(at, &format!("127.0.0.1:{rpc}"), kafka, admin);
        node.restart()?;
        self.nodes.push(node);
        Ok(at)
    }

    /// One that is not of the cluster yet, with settings of its own, and not started.
    pub fn stranger(&self, id: i32, settings: &[&str]) -> Flumen {
        let [rpc, kafka, admin] = free_ports();
        let (id, rpc) = (id.to_string(), format!("127.0.0.1:{rpc}"));
        let more = ["--node-id", &id, "--rpc", &rpc, "--seeds", &self.seeds, "--shards", "1"];
        Flumen::idle_at(&self.dir.join(format!("n{id}")), kafka, admin, settings, &more)
    }

    /// Starts every node that does not run, all at the same time: a majority is needed before one is ready. When one ends
    /// instead, so do the others that were started here, which may wait for it; the error has that one's words.
    pub fn restart_all(&mut self) -> anyhow::Result<()> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let mut started = Vec::new();
        for at in 0..self.nodes.len() {
            if self.nodes[at].is_running() {
                continue;
            }
            let announcements = self.nodes[at].launch()?;
            let sender = sender.clone();
            std::thread::spawn(move || sender.send((at, announcements.until(READY))));
            started.push(at);
        }
        for _ in &started {
            let (at, ready) = receiver.recv()?;
            if ready?.is_none() {
                let error = self.nodes[at].ended_early()?;
                started.iter().for_each(|at| self.nodes[*at].kill_9());
                return Err(error.context(format!("node {} did not start", at + 1)));
            }
        }
        Ok(())
    }

    pub fn stop_all(&mut self) -> anyhow::Result<()> {
        // One after another would leave the last ones without a majority, which they do not need for this.
        std::thread::scope(|scope| {
            let stops: Vec<_> =
                self.nodes.iter_mut().filter(|n| n.is_running()).map(|n| scope.spawn(|| n.stop())).collect();
            for stop in stops {
                let status = stop.join().map_err(|_| anyhow::anyhow!("a stop panicked"))??;
                ensure!(status.success(), "a node did not stop cleanly: {status}");
            }
            Ok(())
        })
    }

    pub fn kill_all(&mut self) {
        self.nodes.iter_mut().for_each(Flumen::kill_9);
    }

    /// For clients: all addresses.
    pub fn kafka(&self) -> String {
        self.nodes.iter().map(|node| node.kafka.as_str()).collect::<Vec<_>>().join(",")
    }

    /// Some node that runs.
    pub fn any(&self) -> anyhow::Result<&Flumen> {
        self.nodes.iter().find(|node| node.is_running()).context("no node runs")
    }

    pub fn create_topic(
        &self,
        name: &str,
        partitions: i32,
        replication_factor: i16,
        configs: &Value,
    ) -> anyhow::Result<()> {
        let body = json!({
            "name": name, "partitions": partitions, "replication_factor": replication_factor, "configs": configs,
        });
        self.any()?.call("POST", "/v1/topics", Some(&body))?;
        self.await_leaders(name).map(drop)
    }

    /// Node ids of the leaders of a topic's partitions, as clients are told; -1 for none.
    pub fn leaders(&self, topic: &str) -> anyhow::Result<Vec<i32>> {
        let client: BaseConsumer =
            ClientConfig::new().set("bootstrap.servers", self.kafka()).set("log_level", "0").create()?;
        let metadata = client.fetch_metadata(Some(topic), Duration::from_secs(60))?;
        let found = metadata.topics().iter().find(|found| found.name() == topic).context("no such topic")?;
        let mut leaders: Vec<_> = found.partitions().iter().map(|p| (p.id(), p.leader())).collect();
        leaders.sort_unstable();
        Ok(leaders.into_iter().map(|(_, leader)| leader).collect())
    }

    /// Node ids of those who vote about the metadata, and up to where it is committed, as a node sees it.
    pub fn quorum(&self, at: usize) -> anyhow::Result<(BTreeSet<i32>, i64)> {
        let partition = PartitionData::default().with_partition_index(0);
        let topic =
            TopicData::default().with_topic_name(topic_name(METADATA_TOPIC)).with_partitions(vec![partition]);
        let request = DescribeQuorumRequest::default().with_topics(vec![topic]);
        let answer = Wire::connect(&self.nodes[at].kafka)?.ask(0, &request)?;
        let found = answer.topics.first().and_then(|topic| topic.partitions.first());
        let found = found.filter(|found| found.error_code == 0).with_context(|| format!("{answer:?}"))?;
        Ok((found.current_voters.iter().map(|voter| voter.replica_id.0).collect(), found.high_watermark))
    }

    /// Waits until every partition of the topic has a leader that runs.
    pub fn await_leaders(&self, topic: &str) -> anyhow::Result<Vec<i32>> {
        self.until(&format!("leaders of {topic}"), || {
            let leaders = self.leaders(topic).ok()?;
            let runs = |id: &i32| {
                usize::try_from(*id - 1).is_ok_and(|at| self.nodes.get(at).is_some_and(Flumen::is_running))
            };
            (!leaders.is_empty() && leaders.iter().all(runs)).then_some(leaders)
        })
    }

    /// Position of the node that leads a partition.
    pub fn leader_of(&self, topic: &str, partition: usize) -> anyhow::Result<usize> {
        let leaders = self.await_leaders(topic)?;
        Ok(usize::try_from(leaders[partition] - 1)?)
    }

    /// Looks until there is an answer. Whoever waits for what never comes is told of it again and again.
    pub fn until<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> anyhow::Result<T> {
        for turn in 1u64.. {
            if let Some(found) = look() {
                return Ok(found);
            }
            if turn.is_multiple_of(200) {
                println!("   still waiting for {what}");
            }
            std::thread::sleep(POLL);
        }
        bail!("{what} never came")
    }

    /// Asks for these replicas, or for a move to be given up; the error code of the partition.
    pub fn reassign(&self, topic: &str, partition: i32, replicas: Option<&[i32]>) -> anyhow::Result<i16> {
        let replicas = replicas.map(|ids| ids.iter().copied().map(BrokerId).collect());
        let partition =
            ReassignablePartition::default().with_partition_index(partition).with_replicas(replicas);
        let topics =
            vec![ReassignableTopic::default().with_name(topic_name(topic)).with_partitions(vec![partition])];
        let request =
            AlterPartitionReassignmentsRequest::default().with_topics(topics).with_timeout_ms(10_000);
        let answer = Wire::connect(&self.any()?.kafka)?.ask(0, &request)?;
        ensure!(answer.error_code == 0, "{answer:?}");
        Ok(answer.responses[0].partitions[0].error_code)
    }

    pub fn await_no_moves(&self) -> anyhow::Result<()> {
        let request = ListPartitionReassignmentsRequest::default().with_topics(None).with_timeout_ms(10_000);
        self.until("all moves to end", || {
            let mut wire = Wire::connect(&self.any().ok()?.kafka).ok()?;
            wire.ask(0, &request).ok()?.topics.is_empty().then_some(())
        })
    }

    /// Waits until so many more records were acknowledged, some in every partition: it shows that the cluster serves.
    pub fn progress(&self, load: &Load, what: &str) -> anyhow::Result<()> {
        let before = load.acknowledged_counts();
        let total = before.values().sum::<usize>() + PROGRESS_RECORDS;
        let began = Instant::now();
        self.until(what, || {
            let counts = load.acknowledged_counts();
            let comes_on = |(partition, count): (&i32, &usize)| {
                counts.get(partition).is_some_and(|now| *now >= count + PROGRESS_RECORDS_EACH)
            };
            (counts.values().sum::<usize>() >= total && before.iter().all(comes_on)).then_some(())
        })?;
        println!("{what}: {PROGRESS_RECORDS} records after {:.1?}", began.elapsed());
        Ok(())
    }

    /// Ends the load, stops the cluster, and compares everything with everything: what was acknowledged, what the group was
    /// given, what is stored, and the bytes of all replicas.
    pub fn check(
        &mut self,
        topic: &str,
        partitions: i32,
        replicas: usize,
        load: &mut Load,
        witnesses: &mut [Witness],
    ) -> anyhow::Result<()> {
        load.finish()?;
        let acknowledged = load.acknowledged();
        let ends = ends_of(&self.kafka(), topic, partitions)?;
        if ends.iter().sum::<i64>() != acknowledged.len() as i64 {
            // The checker says more than a number does.
            let stored = read_all(&self.kafka(), topic, &ends)?;
            judge(topic, &acknowledged, &[], &stored)?;
        }
        ensure!(
            ends.iter().sum::<i64>() == acknowledged.len() as i64,
            "{} acknowledged, {ends:?}",
            acknowledged.len()
        );
        let stored = read_all(&self.kafka(), topic, &ends)?;
        let seen = |witnesses: &[Witness]| -> usize {
            let polled = witnesses.iter().flat_map(Witness::polled);
            polled.map(|polled| polled.place).collect::<BTreeSet<_>>().len()
        };
        if !witnesses.is_empty() {
            self.until("the group to have everything", || {
                (seen(witnesses) >= acknowledged.len()).then_some(())
            })?;
        }
        for witness in witnesses.iter_mut() {
            witness.finish()?;
        }
        judge(topic, &acknowledged, witnesses, &stored)?;
        self.await_caught_up(topic, &ends)?;
        self.stop_all()?;
        let compared = self.compare_replicas(topic, &ends, replicas)?;
        println!("{} records, {compared} batches compared", acknowledged.len());
        Ok(())
    }

    /// Waits until all replicas of a topic know these high watermarks.
    pub fn await_caught_up(&self, topic: &str, ends: &[i64]) -> anyhow::Result<()> {
        for (id, node) in (1i64..).zip(&self.nodes).filter(|(_, node)| node.is_running()) {
            self.until(&format!("node {id} to have all of {topic}"), || {
                let described = node.get(&format!("/v1/topics/{topic}")).ok()?;
                let has = |(partition, end): (&Value, &i64)| {
                    let replicas = partition["replicas"].as_array().into_iter().flatten();
                    let holds = replicas.filter_map(Value::as_i64).any(|replica| replica == id);
                    !holds || partition["high_watermark"].as_i64() == Some(*end)
                };
                described["partition_list"].as_array()?.iter().zip(ends).all(has).then_some(())
            })?;
        }
        Ok(())
    }

    /// After `stop_all`: the bytes of every batch below the high watermarks are the same on all replicas. Returns how many
    /// batches were compared.
    pub fn compare_replicas(&self, topic: &str, ends: &[i64], replicas: usize) -> anyhow::Result<usize> {
        let mut compared = 0;
        for (partition, end) in ends.iter().enumerate() {
            let name = format!("{topic}-{partition}");
            let mut logs = Vec::new();
            for (at, node) in self.nodes.iter().enumerate() {
                if let Some(batches) = batches_of(&node.data_dir.join("data"), &name)? {
                    let below: BTreeMap<i64, Vec<u8>> =
                        batches.into_iter().filter(|(offset, _)| offset < end).collect();
                    logs.push((at + 1, below));
                }
            }
            ensure!(logs.len() == replicas, "{name} lies on {} nodes, not on {replicas}", logs.len());
            let (first, expected) = &logs[0];
            let last =
                expected.values().next_back().map(|batch| record_batch::parse_header(batch)).transpose()?;
            let reaches = last.map_or(0, |header| header.next_offset());
            ensure!(reaches == *end, "{name} on node {first} ends at {reaches}, not at {end}");
            for (node, log) in &logs[1..] {
                for (offset, batch) in expected {
                    ensure!(
                        log.get(offset) == Some(batch),
                        "{name}: the batch at {offset} differs between nodes {first} and {node}"
                    );
                }
                ensure!(
                    log.len() == expected.len(),
                    "{name}: node {node} has batches that node {first} lacks"
                );
                compared += log.len();
            }
        }
        Ok(compared)
    }
}

/// Batches in the segments of a stopped node by their base offset; `None` when it has no replica.
fn batches_of(data: &Path, partition: &str) -> anyhow::Result<Option<BTreeMap<i64, Vec<u8>>>> {
    let named = |path: &PathBuf| {
        // One that was given up may wait for its files to go.
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        name.starts_with(&format!("{partition}.g")) && !name.ends_with(".deleted")
    };
    let inside = |dir: &Path| -> anyhow::Result<Vec<PathBuf>> {
        Ok(std::fs::read_dir(dir)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?)
    };
    let Some(dir) = inside(&data.join("log"))?.into_iter().find(named) else { return Ok(None) };
    let mut batches = BTreeMap::new();
    for segment in inside(&dir)?.iter().filter(|path| path.extension().is_some_and(|e| e == "log")) {
        let bytes = std::fs::read(segment)?;
        let mut rest = bytes.as_slice();
        // Zeros are room that was taken in advance.
        while rest.get(8..12).is_some_and(|length| length != [0; 4]) {
            let header = record_batch::parse_header(rest)
                .with_context(|| format!("{} has no batch where one should be", segment.display()))?;
            let (batch, more) = rest
                .split_at_checked(header.total_bytes())
                .with_context(|| format!("{} ends inside a batch", segment.display()))?;
            let before = batches.insert(header.base_offset, batch.to_vec());
            ensure!(before.is_none(), "two batches at {} of {partition}", header.base_offset);
            rest = more;
        }
    }
    Ok(Some(batches))
}
