//! A load with a consumer at its heels, each on a thread of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::consume::{self, ConsumeConfig, ConsumeResult};
use crate::load::{self, LoadConfig, LoadResult};

const POLL: Duration = Duration::from_millis(1);

/// A consumer of a load's topic, from the topic's start until it is told to stop.
pub fn config(load: &LoadConfig) -> ConsumeConfig {
    ConsumeConfig {
        bootstrap: load.bootstrap.clone(),
        topic: load.topic.clone(),
        partitions: load.partitions,
        connections: 1,
        seconds: f64::from(u16::MAX),
        until_end: false,
        until_lag: None,
        from: consume::From::Earliest,
        partition_max_bytes: 1 << 20,
        max_bytes: 8 << 20,
        max_wait_ms: 100,
        pids: load.pids.clone(),
    }
}

/// A load with one consumer that starts when it starts and stops when it stops.
pub fn with_tail(load: &LoadConfig) -> Result<(LoadResult, ConsumeResult)> {
    let (started, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let producer = std::thread::spawn({
        let (load, started) = (load.clone(), started.clone());
        move || load::run(&load, Some(started))
    });
    while !started.load(Ordering::Acquire) && !producer.is_finished() {
        std::thread::sleep(POLL);
    }
    let consumer = std::thread::spawn({
        // What an earlier run left in the topic is not this load's.
        let tail = ConsumeConfig { from: consume::From::Latest, ..config(load) };
        let stop = stop.clone();
        move || consume::run(&tail, Some(stop))
    });
    let produced = producer.join().map_err(|_| anyhow::anyhow!("the generator panicked"))?;
    stop.store(true, Ordering::Release);
    let consumed = consumer.join().map_err(|_| anyhow::anyhow!("the consumer panicked"))?;
    Ok((produced?, consumed.context("tailing consumer")?))
}
