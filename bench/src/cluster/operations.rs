//! What an operator asks of a cluster while it is measured: topics on chosen nodes, who is in sync, moves.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kafka_protocol::messages::alter_partition_reassignments_request::{
    ReassignablePartition, ReassignableTopic,
};
use kafka_protocol::messages::create_topics_request::{
    CreatableReplicaAssignment, CreatableTopic, CreatableTopicConfig,
};
use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
use kafka_protocol::messages::{
    AlterPartitionReassignmentsRequest, BrokerId, CreateTopicsRequest, MetadataRequest, TopicName,
};
use kafka_protocol::protocol::StrBytes;

use crate::client::{Client, LATEST, error_name};

const CREATE_TOPICS_VERSION: i16 = 7;
const METADATA_VERSION: i16 = 12;
const REASSIGN_VERSION: i16 = 0;
const TIMEOUT_MS: i32 = 60_000;
/// How often a cluster is asked how far it is: seldom enough that asking is no load.
const POLL: Duration = Duration::from_millis(100);
/// Whatever takes longer will not end.
const WAIT_MAX: Duration = Duration::from_secs(240);
/// How often clients ask who leads now: less than a tenth of what an election may take.
const LEADER_POLL: Duration = Duration::from_millis(20);

fn text(s: &str) -> StrBytes {
    StrBytes::from_string(s.to_string())
}

fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// A topic whose partition `p` has these replicas, the first of them its leader, and waits for the leaders.
pub fn create(
    bootstrap: &str,
    topic: &str,
    assignments: &[Vec<i32>],
    configs: &[(String, String)],
) -> Result<()> {
    let assigned = assignments.iter().enumerate().map(|(partition, replicas)| {
        CreatableReplicaAssignment::default()
            .with_partition_index(partition as i32)
            .with_broker_ids(replicas.iter().map(|id| BrokerId(*id)).collect())
    });
    let configs = configs.iter().map(|(name, value)| {
        CreatableTopicConfig::default().with_name(text(name)).with_value(Some(text(value)))
    });
    let wanted = CreatableTopic::default()
        .with_name(TopicName(text(topic)))
        .with_num_partitions(-1)
        .with_replication_factor(-1)
        .with_assignments(assigned.collect())
        .with_configs(configs.collect());
    let request = CreateTopicsRequest::default().with_topics(vec![wanted]).with_timeout_ms(TIMEOUT_MS);
    block_on(async {
        let mut client = Client::connect(bootstrap).await?;
        let response = client.call(&request, CREATE_TOPICS_VERSION).await?;
        let made = response.topics.first().context("CreateTopics answered no topic")?;
        let why = made.error_message.as_ref().map(|m| m.as_str()).unwrap_or_default();
        ensure!(made.error_code == 0, "CreateTopics {topic}: {} {why}", error_name(made.error_code));
        client.leaders(topic, assignments.len()).await?;
        Ok(())
    })
}

/// Asks for these replicas of every partition of a topic.
pub fn reassign(bootstrap: &str, topic: &str, assignments: &[Vec<i32>]) -> Result<()> {
    let partitions = assignments.iter().enumerate().map(|(partition, replicas)| {
        ReassignablePartition::default()
            .with_partition_index(partition as i32)
            .with_replicas(Some(replicas.iter().map(|id| BrokerId(*id)).collect()))
    });
    let moved =
        ReassignableTopic::default().with_name(TopicName(text(topic))).with_partitions(partitions.collect());
    let request =
        AlterPartitionReassignmentsRequest::default().with_topics(vec![moved]).with_timeout_ms(TIMEOUT_MS);
    block_on(async {
        let answer = Client::connect(bootstrap).await?.call(&request, REASSIGN_VERSION).await?;
        let refused = answer.responses.iter().flat_map(|t| &t.partitions).find(|p| p.error_code != 0);
        ensure!(answer.error_code == 0, "reassignment: {}", error_name(answer.error_code));
        if let Some(p) = refused {
            bail!("reassignment of {topic}-{}: {}", p.partition_index, error_name(p.error_code));
        }
        Ok(())
    })
}

fn metadata_of(topic: &str) -> MetadataRequest {
    MetadataRequest::default()
        .with_topics(Some(vec![MetadataRequestTopic::default().with_name(Some(TopicName(text(topic))))]))
        .with_allow_auto_topic_creation(false)
}

/// Which node leads each partition of a topic, and where that listens; only those that have a leader.
async fn leaders(client: &mut Client, topic: &str) -> Result<Vec<(i32, i32, String)>> {
    let request = metadata_of(topic);
    let answer = client.call(&request, METADATA_VERSION).await?;
    let led = answer.topics.iter().flat_map(|t| &t.partitions).filter_map(|p| {
        let broker = answer.brokers.iter().find(|broker| broker.node_id == p.leader_id)?;
        Some((p.partition_index, p.leader_id.0, format!("{}:{}", broker.host.as_str(), broker.port)))
    });
    Ok(led.collect())
}

/// The node that leads most partitions of a topic.
pub fn busiest(bootstrap: &str, topic: &str) -> Result<i32> {
    block_on(async {
        let led = leaders(&mut Client::connect(bootstrap).await?, topic).await?;
        let count = |id: i32| led.iter().filter(|(_, leader, _)| *leader == id).count();
        led.iter().map(|(_, id, _)| *id).max_by_key(|id| count(*id)).context("nobody leads")
    })
}

/// Waits until every partition of a topic has a leader that is not `gone` and says where the partition ends; how long that took.
pub fn until_led_by_others(bootstrap: &str, topic: &str, partitions: usize, gone: i32) -> Result<Duration> {
    let began = Instant::now();
    block_on(async {
        let mut client = Client::connect(bootstrap).await?;
        let mut seen = "nothing".to_string();
        while began.elapsed() < WAIT_MAX {
            let led = leaders(&mut client, topic).await?;
            if led.len() == partitions && led.iter().all(|(_, leader, _)| *leader != gone) {
                match answer_for_all(topic, &led).await {
                    Ok(()) => return Ok(began.elapsed()),
                    Err(error) => seen = format!("{error:#}"),
                }
            }
            tokio::time::sleep(LEADER_POLL).await;
        }
        bail!("{topic} is without node {gone} after {WAIT_MAX:?}, last: {seen}")
    })
}

async fn answer_for_all(topic: &str, led: &[(i32, i32, String)]) -> Result<()> {
    let addresses: std::collections::BTreeSet<&String> = led.iter().map(|(_, _, address)| address).collect();
    for address in addresses {
        let theirs = led.iter().filter(|(_, _, at)| at == address).map(|(p, ..)| u32::try_from(*p));
        let mut theirs: Vec<u32> = theirs.collect::<Result<_, _>>()?;
        theirs.sort_unstable();
        Client::connect(address).await?.offsets(topic, &theirs, LATEST).await?;
    }
    Ok(())
}

/// Waits until exactly these replicas have each partition, all of them in sync; how long that took.
pub fn until_in_sync(bootstrap: &str, topic: &str, assignments: &[Vec<i32>]) -> Result<Duration> {
    let began = Instant::now();
    let request = metadata_of(topic);
    block_on(async {
        let mut client = Client::connect(bootstrap).await?;
        while began.elapsed() < WAIT_MAX {
            let answer = client.call(&request, METADATA_VERSION).await?;
            let sorted = |ids: &[BrokerId]| {
                let mut ids: Vec<i32> = ids.iter().map(|id| id.0).collect();
                ids.sort_unstable();
                ids
            };
            let there = answer.topics.iter().flat_map(|t| &t.partitions).filter(|p| {
                let wanted = usize::try_from(p.partition_index).ok().and_then(|at| assignments.get(at));
                wanted.is_some_and(|wanted| {
                    let mut wanted = wanted.clone();
                    wanted.sort_unstable();
                    sorted(&p.replica_nodes) == wanted && sorted(&p.isr_nodes) == wanted
                })
            });
            if there.count() == assignments.len() {
                return Ok(began.elapsed());
            }
            tokio::time::sleep(POLL).await;
        }
        bail!("{topic} is not in sync after {WAIT_MAX:?}")
    })
}
