//! What the tests bring: the real engine in a process of its own, a topic held in memory as real Kafka batches, a state
//! log, and a proxy that breaks inserts.
// Every test file uses its own part of it.
#![allow(dead_code, unused_imports)]

pub mod engine;
pub mod proxy;
pub mod topic;

use std::collections::BTreeMap;
use std::time::Duration;

use flumen_sink::client::Endpoint;
use flumen_sink::config::ExportConfig;
use flumen_sink::exporter::{ExportHandle, ExportSetup, Exporter};

pub use engine::Engine;
pub use proxy::{Fault, Proxy, Random};
pub use topic::{MemoryLog, MemoryTopic};

pub fn config(topic: &str, pairs: &[(&str, &str)]) -> ExportConfig {
    let mut configs = BTreeMap::from([("flumen.clickhouse.enable".to_owned(), "true".to_owned())]);
    for (name, value) in pairs {
        configs.insert(format!("flumen.clickhouse.{name}"), (*value).to_owned());
    }
    ExportConfig::from_topic(topic, &configs).expect("a valid config").expect("an enabled export")
}

/// One life of a broker's export: dropped in the middle, it is a crash.
pub struct Running {
    pub handle: ExportHandle,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    pub fn start(topic: &MemoryTopic, log: &MemoryLog, config: &ExportConfig, url: &str) -> Running {
        let (exporter, handle) = Exporter::recover(ExportSetup {
            cluster_id: "test".into(),
            topic_id: topic.id(),
            config: config.clone(),
            endpoint: Endpoint::parse(url).expect("a URL"),
            source: topic.clone(),
            state_log: log.clone(),
            records: log.records(),
            before: None,
        })
        .unwrap_or_else(|e| panic!("the state log does not replay: {e}"));
        Running { handle, task: tokio::task::spawn_local(exporter.run()) }
    }

    /// The broker dies: nothing of it runs on. What it sent is on its way.
    pub async fn crash(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    pub async fn stop(self) {
        let _ = self.handle.stop().await;
        self.task.await.expect("the export ends by itself");
    }

    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }
}

/// Waits until everything below the log's end is settled; shows the status now and then for whoever waits with it.
pub async fn until_settled(running: &Running, topic: &MemoryTopic) {
    let mut looks = 0u32;
    while !topic.all_settled() {
        tokio::time::sleep(Duration::from_millis(20)).await;
        looks += 1;
        if looks.is_multiple_of(250) {
            let status = running.handle.status();
            eprintln!(
                "waiting: {:?} rows={} lag={} error={:?}",
                status.state,
                status.rows_total,
                status.lag_records,
                status.last_error.as_ref().map(|e| &e.message)
            );
        }
        assert!(!running.is_finished(), "the export ended: {:?}", running.handle.status());
        let status = running.handle.status();
        assert!(
            status.state != flumen_sink::status::State::Failed,
            "the export failed: {:?}",
            status.last_error
        );
    }
}
