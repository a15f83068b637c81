//! The brokers under measurement, each a child process with a data directory of its own that goes when it goes.
//!
//! A [`Peer`] kills its process with -9 when dropped: what a broker does with a clean stop is not measured here.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, BytesMut};
use clap::Args;
use serde::Serialize;

use crate::batch;
use crate::client::{CLIENT_ID, Client, LATEST, error_name};
use crate::load;
use crate::wire;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Flumen,
    Kafka,
    Null,
}

/// Where the brokers are found.
#[derive(Debug, Clone, Args, Serialize)]
pub struct Sides {
    /// The flumen binary.
    #[arg(long)]
    pub flumen: PathBuf,
    /// The directory of kafka.sh.
    #[arg(long, default_value = "bench")]
    pub bench_dir: PathBuf,
    /// Kafka's jars, when not in .cache/kafka.
    #[arg(long)]
    pub kafka_dir: Option<PathBuf>,
}

impl Sides {
    pub fn ensure_built(&self) -> Result<()> {
        ensure!(self.flumen.exists(), "{} is not there: build it first", self.flumen.display());
        Ok(())
    }
}

/// How long a broker may take to its first answer before it is called broken. Apache Kafka that was killed looks at all of
/// its open segments again: minutes, with 10,000 partitions.
const START_MAX: Duration = Duration::from_secs(600);
/// Fine enough that the poll does not show in the start time.
const CONNECT_POLL: Duration = Duration::from_millis(2);

/// Clusters live on empty directories, one at a time, so they may all have the same.
const KAFKA_CLUSTER_ID: &str = "Zmx1bWVuLWJlbmNoLWthZg";

/// Printed by kafka.sh when the properties are written and the JVM comes next.
const KAFKA_LAUNCHING: &str = "launching kafka=";

pub struct Peer {
    pub child: Child,
    pub kafka: String,
    pub admin: Option<String>,
    command: Command,
    ready: Option<&'static str>,
    data: PathBuf,
    log: PathBuf,
    pub spawned: Instant,
}

/// A port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn launch(command: &mut Command) -> Result<Child> {
    command.spawn().with_context(|| format!("cannot run {}", command.get_program().to_string_lossy()))
}

impl Peer {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn spawn(
        command: Command,
        data: PathBuf,
        kafka: String,
        ready: Option<&'static str>,
    ) -> Result<(Self, String)> {
        let mut peer = Self::begin(command, data, kafka, ready)?;
        let line = peer.await_ready()?;
        Ok((peer, line))
    }

    /// Starts the process, and does not wait for it.
    fn begin(
        mut command: Command,
        data: PathBuf,
        kafka: String,
        ready: Option<&'static str>,
    ) -> Result<Self> {
        if let Some(parent) = data.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        }
        // Left by a run that was interrupted; every broker starts on an empty directory.
        if data.exists() {
            std::fs::remove_dir_all(&data).with_context(|| format!("cannot empty {}", data.display()))?;
        }
        let log = data.with_extension("log");
        let errors =
            std::fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let spawned = Instant::now();
        let child = launch(&mut command)?;
        Ok(Self { child, kafka, admin: None, command, ready, data, log, spawned })
    }

    fn await_ready(&mut self) -> Result<String> {
        let mut line = String::new();
        if let Some(prefix) = self.ready {
            let out = self.child.stdout.take().context("no stdout")?;
            let mut out = BufReader::new(out);
            while !line.starts_with(prefix) {
                line.clear();
                if out.read_line(&mut line)? == 0 {
                    bail!("the process ended before it was ready:\n{}", self.log_tail());
                }
            }
            // Left open and drained, so that a later line neither blocks nor breaks the process.
            std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
        }
        Ok(line)
    }

    /// Kills the process with -9 and starts it again on what it left.
    pub fn crash_and_restart(&mut self) -> Result<()> {
        self.crash()?;
        self.restart()
    }

    pub fn crash(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts a process that crashed again, on what it left.
    pub fn restart(&mut self) -> Result<()> {
        self.spawned = Instant::now();
        self.child = launch(&mut self.command)?;
        let line = self.await_ready()?;
        if line.starts_with(KAFKA_LAUNCHING) {
            self.spawned = Instant::now();
        }
        Ok(())
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    pub fn flumen(binary: &Path, work: &Path, settings: &[String]) -> Result<Self> {
        let (kafka, admin) = (format!("127.0.0.1:{}", free_port()?), format!("127.0.0.1:{}", free_port()?));
        let data = work.join("flumen");
        let mut command = Command::new(binary);
        command.arg("server").arg("--data-dir").arg(&data);
        command.args(["--kafka", &kafka, "--admin", &admin]);
        for s in settings {
            command.args(["--set", s]);
        }
        let (mut peer, _) = Self::spawn(command, data, kafka, Some("flumen ready kafka="))?;
        peer.admin = Some(admin);
        Ok(peer)
    }

    /// So many brokers that are one cluster, each with a directory of its own.
    pub fn flumen_cluster(binary: &Path, work: &Path, count: usize) -> Result<Vec<Self>> {
        let rpc: Vec<String> =
            (0..count).map(|_| Ok(format!("127.0.0.1:{}", free_port()?))).collect::<Result<_>>()?;
        let mut peers = Vec::with_capacity(count);
        for (at, rpc_address) in rpc.iter().enumerate() {
            let (kafka, admin) =
                (format!("127.0.0.1:{}", free_port()?), format!("127.0.0.1:{}", free_port()?));
            let data = work.join(format!("flumen-{}", at + 1));
            let mut command = Command::new(binary);
            command.arg("server").arg("--data-dir").arg(&data).args(["--kafka", &kafka, "--admin", &admin]);
            command.args(["--node-id", &(at + 1).to_string(), "--rpc", rpc_address]);
            command.args(["--seeds", &rpc.join(",")]);
            let mut peer = Self::begin(command, data, kafka, Some("flumen ready kafka="))?;
            peer.admin = Some(admin);
            peers.push(peer);
        }
        peers.iter_mut().try_for_each(|peer| peer.await_ready().map(|_| ()))?;
        Ok(peers)
    }

    /// The same of Apache Kafka: brokers that are controllers, too. They share what topics of their own are replicated by.
    pub fn kafka_cluster(
        bench_dir: &Path,
        jars: Option<&Path>,
        work: &Path,
        count: usize,
    ) -> Result<Vec<Self>> {
        let controllers: Vec<u16> = (0..count).map(|_| free_port()).collect::<Result<_>>()?;
        let voters: Vec<String> = (controllers.iter().enumerate())
            .map(|(at, port)| format!("{}@127.0.0.1:{port}", at + 1))
            .collect();
        let mut peers = Vec::with_capacity(count);
        for (at, controller) in controllers.iter().enumerate() {
            let port = free_port()?;
            let data = work.join(format!("kafka-{}", at + 1));
            let mut command = Command::new(bench_dir.join("kafka.sh"));
            command.arg("run").arg("--data").arg(&data).args(["--port", &port.to_string()]);
            command.args(["--node-id", &(at + 1).to_string(), "--controller", &controller.to_string()]);
            command.args(["--cluster-id", KAFKA_CLUSTER_ID]);
            command.args(["--set", &format!("controller.quorum.voters={}", voters.join(","))]);
            command.args(["--set", &format!("offsets.topic.replication.factor={count}")]);
            if let Some(jars) = jars {
                command.env("KAFKA_DIR", jars);
            }
            let server_log = data.join("server.log");
            let mut peer = Self::begin(command, data, format!("127.0.0.1:{port}"), Some(KAFKA_LAUNCHING))?;
            peer.log = server_log;
            peers.push(peer);
        }
        peers.iter_mut().try_for_each(|peer| peer.await_ready().map(|_| ()))?;
        Ok(peers)
    }

    /// The embedded ClickHouse; `kafka` holds its HTTP address.
    pub fn clickhouse(binary: &Path, work: &Path) -> Result<Self> {
        let listen = format!("127.0.0.1:{}", free_port()?);
        let data = work.join("clickhouse");
        let mut command = Command::new(binary);
        command.arg("clickhouse").arg("--data-dir").arg(&data).args(["--listen", &listen]);
        Ok(Self::spawn(command, data, listen, Some("flumen clickhouse ready"))?.0)
    }

    pub fn kafka(bench_dir: &Path, jars: Option<&Path>, work: &Path, settings: &[String]) -> Result<Self> {
        let kafka = format!("127.0.0.1:{}", free_port()?);
        let data = work.join("kafka");
        let mut command = Command::new(bench_dir.join("kafka.sh"));
        command.arg("run").arg("--data").arg(&data);
        command.args(["--port", kafka.rsplit(':').next().unwrap_or_default()]);
        for s in settings {
            command.args(["--set", s]);
        }
        if let Some(jars) = jars {
            command.env("KAFKA_DIR", jars);
        }
        let server_log = data.join("server.log");
        let (mut peer, _) = Self::spawn(command, data, kafka, Some(KAFKA_LAUNCHING))?;
        // Formatting the directory is not starting: the clock runs from the moment the JVM is launched.
        peer.spawned = Instant::now();
        peer.log = server_log;
        Ok(peer)
    }

    pub fn null(work: &Path) -> Result<Self> {
        let kafka = format!("127.0.0.1:{}", free_port()?);
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["null", "--listen", &kafka]);
        Ok(Self::spawn(command, work.join("null"), kafka, Some("null ready"))?.0)
    }

    /// Waits until it, and what else its cluster has, makes a topic with so many replicas.
    pub fn until_up(&mut self, replication_factor: i16) -> Result<()> {
        self.until_answering(async |client| client.ensure_topic("up", 1, replication_factor, &[]).await)?;
        Ok(())
    }

    /// From spawn to the acknowledgement of one record in a new topic.
    pub fn first_ack(&mut self) -> Result<Duration> {
        self.until_answering(async |client| {
            client.ensure_topic("first-ack", 1, 1, &[]).await?;
            // Metadata can name a leader before that leader knows; only an answer from it proves it.
            client.offsets("first-ack", &[0], LATEST).await?;
            let batch = batch::encode_filler(1, 100, None, load::now_ms());
            produce_one(client, "first-ack", 0, &batch).await
        })
    }

    /// From spawn to the acknowledgement of one record in a partition that was there before.
    pub fn first_ack_in(&mut self, topic: &str, partition: i32) -> Result<Duration> {
        let spawned = self.spawned;
        self.until_answering(async |client| {
            let batch = batch::encode_filler(1, 100, None, load::now_ms());
            loop {
                match produce_code(client, topic, partition, &batch).await? {
                    0 => return Ok(()),
                    // Unknown, no leader, loading: what a broker says before it has everything open again.
                    3 | 5 | 6 | 14 | 15 | 16 if spawned.elapsed() < START_MAX => {
                        tokio::time::sleep(CONNECT_POLL).await;
                    }
                    code => bail!("Produce to {topic}-{partition}: {}", error_name(code)),
                }
            }
        })
    }

    fn until_answering(&mut self, work: impl AsyncFnOnce(&mut Client) -> Result<()>) -> Result<Duration> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut client = loop {
                if let Ok(client) = Client::connect(&self.kafka).await {
                    break client;
                }
                if let Some(status) = self.child.try_wait()? {
                    bail!("the broker ended while starting ({status}):\n{}", self.log_tail());
                }
                if self.spawned.elapsed() > START_MAX {
                    bail!("no connection to {} in {START_MAX:?}:\n{}", self.kafka, self.log_tail());
                }
                tokio::time::sleep(CONNECT_POLL).await;
            };
            work(&mut client).await?;
            Ok(self.spawned.elapsed())
        })
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Already gone is fine, and there is nobody to tell about a directory that cannot be removed.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.data);
    }
}

/// One batch, one answer.
pub async fn produce_one(client: &mut Client, topic: &str, partition: i32, batch: &[u8]) -> Result<()> {
    match produce_code(client, topic, partition, batch).await? {
        0 => Ok(()),
        code => bail!("Produce to {topic}-{partition}: {}", error_name(code)),
    }
}

async fn produce_code(client: &mut Client, topic: &str, partition: i32, batch: &[u8]) -> Result<i16> {
    const VERSION: i16 = 12;
    let mut frame = BytesMut::with_capacity(batch.len() + 128);
    wire::start_request(&mut frame, wire::PRODUCE, VERSION, 0, CLIENT_ID);
    frame.put_u8(0);
    frame.put_i16(-1);
    frame.put_i32(30_000);
    wire::put_uvarint(&mut frame, 2);
    wire::put_compact_str(&mut frame, topic);
    wire::put_uvarint(&mut frame, 2);
    frame.put_i32(partition);
    wire::put_uvarint(&mut frame, batch.len() as u32 + 1);
    frame.put_slice(batch);
    frame.put_slice(&[0, 0, 0]);
    wire::finish_frame(&mut frame, 0, 0);
    let answer = client.exchange(&frame).await?;
    let mut answered = 0;
    load::parse_answer(&answer, 0, VERSION, |code| answered = code)?;
    Ok(answered)
}
