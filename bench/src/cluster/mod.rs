//! `cluster`: three nodes of Flumen against three of Apache Kafka, on one machine, replication factor 3, acks=all.
//!
//! CPU is that of the three processes together. A round is one cluster on empty directories: started, warmed up, put
//! through its cells, killed, removed. What the cells are is in `bench/README.md`.

mod operations;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;

use crate::consume::ConsumeResult;
use crate::load::{self, LoadConfig, LoadResult, Mode, Slice};
use crate::log::figure::{Measure, Samples};
use crate::log::report::{Goal, Verdict, print_verdicts};
use crate::log::variant::{DURABLE, KAFKA, OS, Variant};
use crate::peer::{Peer, Side, Sides};
use crate::stats::{self, Machine};
use crate::tail;

const NODES: usize = 3;
/// A multiple of the nodes (33 each, three requests of 11 in `touch`), so that each leads as many.
const PARTITIONS: usize = 99;
const IDLE_GROUPS: usize = 1_000;
/// After the last load, and after a thousand partitions were made: everybody has fallen asleep who does.
const IDLE_SETTLE: Duration = Duration::from_secs(15);
/// CPU is counted in hundredths of a second.
const IDLE_WINDOW: Duration = Duration::from_secs(20);
/// Open loops offer this share of Kafka's maximum; beside a catch-up, where one node's start takes a core for seconds, less.
const LOAD: f64 = 0.5;
const LOAD_BESIDE: f64 = 0.25;
/// Producers alone before something happens beside them.
const BEFORE_S: f64 = 5.0;

#[derive(Debug, Clone, Args, Serialize)]
pub struct ClusterConfig {
    #[command(flatten)]
    #[serde(flatten)]
    pub sides: Sides,
    /// Where brokers keep their data: one file system for all of them.
    #[arg(long, default_value = ".cache/bench-cluster")]
    pub work: PathBuf,
    /// Raw figures, as JSON; written anew after every round.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// A B instead of A B B A, and short windows.
    #[arg(long)]
    pub quick: bool,
    /// Measured seconds of every cell.
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Seconds of load before the first cell of a cluster; three JVMs need them.
    #[arg(long)]
    pub first_warmup: Option<f64>,
    /// Batches a second of which the open loops offer a share; found by a round of Kafka's own when absent.
    #[arg(long)]
    pub kafka_maximum: Option<f64>,
    /// Only kill leaders, this often in each round.
    #[arg(long)]
    pub failovers: Option<usize>,
    /// Exit with 1 when a figure misses its goal.
    #[arg(long)]
    pub check: bool,
}

impl ClusterConfig {
    fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 5.0 } else { 8.0 })
    }

    fn first_warmup(&self, side: Side) -> f64 {
        let kafka = self.first_warmup.unwrap_or(if self.quick { 20.0 } else { 60.0 });
        // What was compiled before has only files to fill.
        if side == Side::Kafka { kafka } else { kafka / 6.0 }
    }

    /// Leaders that are killed in a round.
    fn kills(&self) -> usize {
        self.failovers.unwrap_or(if self.quick { 2 } else { 5 })
    }

    /// What has to be caught up.
    fn backlog_batches(&self) -> u64 {
        if self.quick { 1_200 } else { 2_400 }
    }
}

/// One load of one round.
#[derive(Debug, Clone, Serialize)]
struct Cell {
    cell: &'static str,
    variant: &'static str,
    round: usize,
    load: LoadResult,
    tail: Option<ConsumeResult>,
}

/// A figure that is not a load's.
#[derive(Debug, Clone, Serialize)]
struct Reading {
    name: &'static str,
    variant: &'static str,
    round: usize,
    value: f64,
}

#[derive(Serialize)]
struct Report<'a> {
    unix_ms: i64,
    machine: &'a Machine,
    config: &'a ClusterConfig,
    kafka_maximum_batches_per_s: f64,
    cells: &'a [Cell],
    readings: &'a [Reading],
    verdicts: &'a [Verdict],
}

struct Session<'c> {
    config: &'c ClusterConfig,
    work: PathBuf,
    began: Instant,
    cells: Vec<Cell>,
    readings: Vec<Reading>,
}

/// A cluster in its turn.
struct Nodes {
    side: Side,
    peers: Vec<Peer>,
    round: usize,
}

const SMALL: &str = "one-record batches";
const BIG: &str = "128 KiB batches";
const OPEN: &str = "half of Kafka's maximum";
const CATCH_UP: &str = "beside a catch-up";
const MOVE: &str = "beside a move";
const IDLE: &str = "1,000 idle partitions: share of a core";
const IDLE_ALL: &str = "three nodes that nobody uses: share of a core";
const UP: &str = "start of three nodes, s";
const FAILOVER: &str = "kill -9 of a leader until all it led have another, s";
const CAUGHT_UP: &str = "catch-up, s";
const MOVED: &str = "move, s";
const CATCH_UP_RATE: &str = "rate beside a catch-up, by before";
const MOVE_RATE: &str = "rate beside a move, by before";

pub fn run(config: &ClusterConfig) -> Result<ExitCode> {
    config.sides.ensure_built()?;
    std::fs::create_dir_all(&config.work)
        .with_context(|| format!("cannot create {}", config.work.display()))?;
    let work = config.work.canonicalize()?;
    let machine = stats::machine(&work);
    println!(
        "{}, {} cores, {} GiB, Linux {}, data on {}; three nodes a side, replication factor 3",
        machine.cpu, machine.cores, machine.memory_gib, machine.kernel, machine.data_filesystem
    );
    let mut session =
        Session { config, work, began: Instant::now(), cells: Vec::new(), readings: Vec::new() };
    let maximum = match config.kafka_maximum {
        Some(rate) => rate,
        None if config.failovers.is_some() => 0.0,
        None => session.kafka_maximum()?,
    };
    let order: &[Side] = if config.quick {
        &[Side::Flumen, Side::Kafka]
    } else {
        &[Side::Flumen, Side::Kafka, Side::Kafka, Side::Flumen]
    };
    let mut verdicts = Vec::new();
    for (i, side) in order.iter().enumerate() {
        session.round(i + 1, *side, maximum).with_context(|| format!("round {} ({side:?})", i + 1))?;
        verdicts = session.verdicts();
        let report = Report {
            unix_ms: load::now_ms(),
            machine: &machine,
            config,
            kafka_maximum_batches_per_s: maximum,
            cells: &session.cells,
            readings: &session.readings,
            verdicts: &verdicts,
        };
        crate::write_json(config.out.as_deref(), &report)?;
    }
    println!();
    print_verdicts(&verdicts);
    println!();
    for v in [DURABLE, OS, KAFKA] {
        println!("{}: {}", v.name, v.promise);
    }
    println!("Kafka's maximum here: {maximum:.0} one-record batches/s");
    let mut failed = false;
    for cell in session.cells.iter().filter(|c| !c.load.errors.is_empty() || c.load.unanswered > 0) {
        failed = true;
        let l = &cell.load;
        println!("{} ({}): errors {:?}, unanswered {}", cell.cell, cell.variant, l.errors, l.unanswered);
    }
    println!("took {:.1} minutes", session.began.elapsed().as_secs_f64() / 60.0);
    let missed = failed || verdicts.iter().any(Verdict::missed);
    Ok(if config.check && missed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

impl Session<'_> {
    fn say(&self, text: &str) {
        println!("[{:>5.0} s] {text}", self.began.elapsed().as_secs_f64());
    }

    fn start(&mut self, side: Side, round: usize) -> Result<Nodes> {
        let c = self.config;
        let began = Instant::now();
        let mut peers = match side {
            Side::Flumen => Peer::flumen_cluster(&c.sides.flumen, &self.work, NODES)?,
            _ => Peer::kafka_cluster(&c.sides.bench_dir, c.sides.kafka_dir.as_deref(), &self.work, NODES)?,
        };
        for peer in &mut peers {
            peer.until_up(NODES as i16)?;
        }
        let took = began.elapsed().as_secs_f64();
        self.say(&format!("round {round}: three nodes of {side:?} up in {took:.2} s"));
        let nodes = Nodes { side, peers, round };
        if round > 0 {
            self.reading(UP, nodes.variants()[0].name, round, took);
        }
        let warm_up = LoadConfig {
            topic: "warm-up".into(),
            seconds: c.first_warmup(side),
            warmup_seconds: 0.0,
            ..self.shape(&nodes)
        };
        load::run(&warm_up, None).context("warm-up")?;
        Ok(nodes)
    }

    /// 48 connections, 5 in flight, one-record batches of 1 KiB, closed loop, three replicas.
    fn shape(&self, nodes: &Nodes) -> LoadConfig {
        LoadConfig {
            bootstrap: nodes.peers[0].kafka.clone(),
            partitions: PARTITIONS,
            connections: 48,
            in_flight: 5,
            seconds: self.config.seconds(),
            replication_factor: NODES as i16,
            pids: nodes.peers.iter().map(Peer::pid).collect(),
            ..LoadConfig::one_record_batches()
        }
    }

    fn cell(
        &mut self,
        nodes: &Nodes,
        cell: &'static str,
        variant: &Variant,
        config: LoadConfig,
        with_tail: bool,
    ) -> Result<&Cell> {
        let config = LoadConfig {
            topic: topic_of(cell, variant),
            topic_configs: variant.topic_configs(&[]),
            ..config
        };
        self.touch(&config)?;
        let (load, tail) = if with_tail {
            let (load, tail) = tail::with_tail(&config).with_context(|| cell.to_string())?;
            (load, Some(tail))
        } else {
            (load::run(&config, None).with_context(|| cell.to_string())?, None)
        };
        let l = &load;
        let cpu = l.broker.as_ref().map_or((0.0, 0.0), |b| (b.cpu_us_per_batch, b.cpu_s_per_gb));
        let consumed =
            tail.as_ref().map_or_else(String::new, |t| format!(", consumed {:.0} MB/s", t.mb_per_s));
        let errors = if l.errors.is_empty() { String::new() } else { format!(", ERRORS {:?}", l.errors) };
        self.say(&format!(
            "  {cell}, {}: {:.0} batches/s, {:.1} MB/s, {:.1} us/batch, {:.2} CPU-s/GB, p50/p99/p99.9 \
             {:.1}/{:.1}/{:.1} ms{consumed}{errors}",
            variant.name,
            l.batches_per_s,
            l.mb_per_s,
            cpu.0,
            cpu.1,
            l.latency.p50_ms,
            l.latency.p99_ms,
            l.latency.p999_ms
        ));
        self.cells.push(Cell { cell, variant: variant.name, round: nodes.round, load, tail });
        self.cells.last().context("just pushed")
    }

    /// Gives every partition some batches first: the first ones of a partition cost Kafka some ten milliseconds each.
    fn touch(&self, config: &LoadConfig) -> Result<()> {
        let first = LoadConfig {
            connections: NODES,
            record_bytes: 8 << 10,
            batch_records: 1,
            partitions_per_request: 11,
            mode: Mode::Closed,
            batches: Some((4 * config.partitions) as u64),
            seconds: 300.0,
            warmup_seconds: 0.0,
            pids: Vec::new(),
            ..config.clone()
        };
        let r = load::run(&first, None).context("first batches")?;
        ensure!(r.errors.is_empty(), "first batches: {:?}", r.errors);
        Ok(())
    }

    fn reading(&mut self, name: &'static str, variant: &'static str, round: usize, value: f64) {
        self.say(&format!("  {name}, {variant}: {value:.3}"));
        self.readings.push(Reading { name, variant, round, value });
    }

    /// In a round of its own, so that no measured round has an odd first cell.
    fn kafka_maximum(&mut self) -> Result<f64> {
        let nodes = self.start(Side::Kafka, 0)?;
        let shape = self.shape(&nodes);
        let rate = self.cell(&nodes, "maximum", &KAFKA, shape, false)?.load.batches_per_s;
        self.say(&format!("Kafka's maximum: {rate:.0} batches/s"));
        Ok(rate)
    }

    fn round(&mut self, round: usize, side: Side, maximum: f64) -> Result<()> {
        let mut nodes = self.start(side, round)?;
        let outcome = self.measure(&mut nodes, maximum);
        outcome.with_context(|| {
            let words = nodes.peers.iter().map(Peer::log_tail).collect::<Vec<_>>();
            format!("the nodes' last words:\n{}", words.join("\n--\n"))
        })
    }

    fn measure(&mut self, nodes: &mut Nodes, maximum: f64) -> Result<()> {
        if self.config.failovers.is_some() {
            return self.failovers(nodes);
        }
        for v in nodes.variants() {
            let shape = self.shape(nodes);
            self.cell(nodes, SMALL, &v, shape, false)?;
        }
        for v in nodes.variants() {
            let big = LoadConfig { partitions: 18, connections: 6, batch_records: 128, ..self.shape(nodes) };
            self.cell(nodes, BIG, &v, big, true)?;
        }
        for v in nodes.variants() {
            let open = LoadConfig { mode: Mode::Open, rate: maximum * LOAD, ..self.shape(nodes) };
            self.cell(nodes, OPEN, &v, open, false)?;
        }
        self.beside(nodes, maximum, CATCH_UP)?;
        self.beside(nodes, maximum, MOVE)?;
        self.failovers(nodes)?;
        self.idle(nodes)
    }

    /// Kills the node that leads most, again and again, and has it come back in between.
    fn failovers(&mut self, nodes: &mut Nodes) -> Result<()> {
        let v = nodes.variants()[0];
        let topic = topic_of("failover", &v);
        let all = everywhere(PARTITIONS);
        operations::create(&nodes.peers[0].kafka, &topic, &all, &v.topic_configs(&[]))?;
        operations::until_in_sync(&nodes.peers[0].kafka, &topic, &all)?;
        for _ in 0..self.config.kills() {
            let gone = operations::busiest(&nodes.peers[0].kafka, &topic)?;
            let at = usize::try_from(gone - 1).context("node ids begin at 1")?;
            let other = nodes.peers[(at + 1) % NODES].kafka.clone();
            nodes.peers[at].crash()?;
            let took = operations::until_led_by_others(&other, &topic, PARTITIONS, gone)?;
            self.reading(FAILOVER, v.name, nodes.round, took.as_secs_f64());
            nodes.peers[at].restart()?;
            operations::until_in_sync(&other, &topic, &all)?;
        }
        Ok(())
    }

    /// Producers to leaders on nodes 1 and 2, while node 3 catches up what it missed while it was away, or gets the replicas
    /// that node 2 or 1 had.
    fn beside(&mut self, nodes: &mut Nodes, maximum: f64, cell: &'static str) -> Result<()> {
        let v = nodes.variants()[0];
        let bootstrap = nodes.peers[0].kafka.clone();
        let topic = topic_of(cell, &v);
        let catches_up = cell == CATCH_UP;
        let partitions = 24;
        let pair = |at: usize| if at.is_multiple_of(2) { (1, 2) } else { (2, 1) };
        let (from, to): (Vec<Vec<i32>>, Vec<Vec<i32>>) = (0..partitions)
            .map(pair)
            .map(|(a, b)| if catches_up { (vec![a, b, 3], vec![a, b, 3]) } else { (vec![a, b], vec![a, 3]) })
            .unzip();
        operations::create(&bootstrap, &topic, &from, &v.topic_configs(&[]))?;
        if catches_up {
            nodes.peers[NODES - 1].crash()?;
        }
        let on = |ids: Vec<u32>| LoadConfig { partitions, connections: 8, pids: ids, ..self.shape(nodes) };
        let leaders: Vec<u32> = nodes.peers[..2].iter().map(Peer::pid).collect();
        let backlog = LoadConfig {
            topic: topic.clone(),
            batch_records: 128,
            batches: Some(self.config.backlog_batches()),
            // As long as it takes: Kafka first has to notice that a replica is gone.
            seconds: 300.0,
            warmup_seconds: 0.0,
            ..on(Vec::new())
        };
        let filled = load::run(&backlog, None).context("backlog")?;
        ensure!(filled.errors.is_empty(), "the backlog was refused: {:?}", filled.errors);
        let window = BEFORE_S + if self.config.quick { 15.0 } else { 25.0 };
        let open = LoadConfig {
            mode: Mode::Open,
            rate: maximum * LOAD_BESIDE,
            seconds: window,
            connections: 48,
            ..on(leaders)
        };
        let began = Instant::now();
        let warm = Duration::from_secs_f64(open.warmup_seconds + BEFORE_S);
        let (restarted, open_topic, away) = (catches_up, topic.clone(), &mut nodes.peers[NODES - 1]);
        let (load, took) = std::thread::scope(|scope| -> Result<(LoadResult, Duration)> {
            let config = LoadConfig { topic: open_topic, ..open };
            let producers = scope.spawn(move || load::run(&config, None));
            std::thread::sleep(warm.saturating_sub(began.elapsed()));
            if restarted {
                away.restart()?;
            } else {
                operations::reassign(&bootstrap, &topic, &to)?;
            }
            let took = operations::until_in_sync(&bootstrap, &topic, &to)?;
            let load = producers.join().map_err(|_| anyhow::anyhow!("the generator panicked"))??;
            Ok((load, took))
        })?;
        let (before, beside) = halves(&load.slices, BEFORE_S, took.as_secs_f64());
        let round = nodes.round;
        let names = if catches_up { (CATCH_UP_RATE, CAUGHT_UP) } else { (MOVE_RATE, MOVED) };
        self.reading(names.1, v.name, round, took.as_secs_f64());
        self.reading(names.0, v.name, round, beside / before);
        self.cells.push(Cell { cell, variant: v.name, round, load, tail: None });
        Ok(())
    }

    fn idle(&mut self, nodes: &Nodes) -> Result<()> {
        let v = nodes.variants()[0];
        let bootstrap = nodes.peers[0].kafka.clone();
        let pids: Vec<u32> = nodes.peers.iter().map(Peer::pid).collect();
        let all = everywhere(IDLE_GROUPS);
        let share = || -> Result<f64> {
            std::thread::sleep(IDLE_SETTLE);
            let before = stats::cpu_of(&pids)?.context("no process")?;
            let at = Instant::now();
            std::thread::sleep(IDLE_WINDOW);
            let cpu = stats::cpu_of(&pids)?.context("no process")?.since(before);
            Ok(cpu.total() / at.elapsed().as_secs_f64())
        };
        let without = share()?;
        operations::create(&bootstrap, "idle", &all, &[])?;
        let with = share()?;
        self.reading(IDLE_ALL, v.name, nodes.round, with);
        self.reading(IDLE, v.name, nodes.round, with - without);
        Ok(())
    }

    fn slices(&self, cell: &str, v: &Variant, measure: Measure) -> Samples<'_> {
        let of = self.cells.iter().filter(|c| c.cell == cell && c.variant == v.name && c.round > 0);
        Samples::Slices(of.flat_map(|c| &c.load.slices).collect(), measure)
    }

    fn read(&self, name: &str, v: &Variant) -> impl Iterator<Item = f64> {
        let of = self.readings.iter().filter(move |r| r.name == name && r.variant == v.name);
        of.map(|r| r.value)
    }

    fn values(&self, name: &str, v: &Variant) -> Samples<'static> {
        Samples::Values(self.read(name, v).collect())
    }

    fn slowest(&self, name: &str, v: &Variant) -> Samples<'static> {
        Samples::Values(self.read(name, v).reduce(f64::max).into_iter().collect())
    }

    fn verdicts(&self) -> Vec<Verdict> {
        let by = |row, what: &str, goal, cell: &str, measure, v: &Variant| {
            let (flumen, kafka) = (self.slices(cell, v, measure), self.slices(cell, &KAFKA, measure));
            Verdict::ratio(row, what, goal, (v, &flumen), (&KAFKA, &kafka))
        };
        let (cpu, gb, p999) = (Measure::CpuUsPerBatch, Measure::CpuSPerGb, Measure::Quantile(0.999));
        let own_of = |row, goal, name: &str, of: &dyn Fn(&Variant) -> Samples<'static>| {
            Verdict::own(row, name, goal, &DURABLE, of(&DURABLE).figure(), of(&KAFKA).figure())
        };
        let own = |row, goal, name: &str| own_of(row, goal, name, &|v| self.values(name, v));
        // Of so few the 99th percentile is the slowest.
        let slowest = |row, goal, name: &str| own_of(row, goal, name, &|v| self.slowest(name, v));
        vec![
            by(
                1,
                "one-record batches: CPU us of the cluster per batch",
                Goal::AtMost(0.25),
                SMALL,
                cpu,
                &DURABLE,
            ),
            by(1, "one-record batches: CPU us of the cluster per batch", Goal::AtMost(0.25), SMALL, cpu, &OS),
            by(1, "batches/s", Goal::Informs, SMALL, Measure::BatchesPerS, &DURABLE),
            by(1, "p99 ms", Goal::Informs, SMALL, Measure::Quantile(0.99), &DURABLE),
            by(2, "128 KiB batches: CPU-s of the cluster per GB", Goal::AtMost(0.3), BIG, gb, &DURABLE),
            by(2, "128 KiB batches: CPU-s of the cluster per GB", Goal::AtMost(0.3), BIG, gb, &OS),
            by(2, "MB/s", Goal::Informs, BIG, Measure::DeliveredMbPerS, &DURABLE),
            by(3, "p99.9 ms at half of Kafka's maximum", Goal::AtMost(0.5), OPEN, p999, &OS),
            by(3, "p99.9 ms at half of Kafka's maximum", Goal::AtMost(1.0), OPEN, p999, &DURABLE),
            by(3, "p99 ms", Goal::Informs, OPEN, Measure::Quantile(0.99), &DURABLE),
            own(4, Goal::AtLeast(0.95), CATCH_UP_RATE),
            own(4, Goal::Informs, CAUGHT_UP),
            by(4, "p99 ms beside a catch-up", Goal::Informs, CATCH_UP, Measure::Quantile(0.99), &DURABLE),
            own(5, Goal::AtLeast(0.95), MOVE_RATE),
            own(5, Goal::Informs, MOVED),
            by(5, "p99 ms beside a move", Goal::Informs, MOVE, Measure::Quantile(0.99), &DURABLE),
            own(6, Goal::AtMost(0.01), IDLE),
            own(6, Goal::Informs, IDLE_ALL),
            own(7, Goal::Informs, UP),
            slowest(8, Goal::AtMost(2.0), FAILOVER),
        ]
    }
}

impl Nodes {
    fn variants(&self) -> Vec<Variant> {
        if self.side == Side::Flumen { vec![DURABLE, OS] } else { vec![KAFKA] }
    }
}

/// Replicas of so many partitions on all three nodes, each node first of a third of them.
fn everywhere(partitions: usize) -> Vec<Vec<i32>> {
    (0..partitions as i32).map(|p| (0..3).map(|at| 1 + (p + at) % 3).collect()).collect()
}

/// Batches a second before `before_s`, and in the `beside_s` after that: those of whole slices, at least one.
fn halves(slices: &[Slice], before_s: f64, beside_s: f64) -> (f64, f64) {
    let (mut at, mut before, mut beside) = (0.0, Vec::new(), Vec::new());
    for slice in slices {
        if at + slice.seconds <= before_s + 0.1 {
            before.push(slice);
        } else if at < before_s + beside_s.max(1.0) {
            beside.push(slice);
        }
        at += slice.seconds;
    }
    let rate = |of: &[&Slice]| {
        let seconds: f64 = of.iter().map(|s| s.seconds).sum();
        of.iter().map(|s| s.batches).sum::<u64>() as f64 / seconds.max(1e-9)
    };
    (rate(&before), rate(&beside))
}

fn topic_of(cell: &str, variant: &Variant) -> String {
    crate::log::session::topic_name(cell, variant)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Latency;

    #[test]
    fn what_is_beside_begins_where_before_ends() {
        let slice = |batches| Slice {
            seconds: 1.0,
            batches,
            records: batches,
            bytes: 0,
            broker_cpu_s: None,
            latency: Latency::default(),
            latency_us: Vec::new(),
        };
        let slices: Vec<Slice> = [10, 10, 5, 6, 100].into_iter().map(slice).collect();
        assert_eq!(halves(&slices, 2.0, 2.0), (10.0, 5.5));
        assert_eq!(halves(&slices, 2.0, 0.2), (10.0, 5.0), "a whole slice at least");
    }
}
