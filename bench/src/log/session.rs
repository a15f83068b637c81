//! One session: brokers come and go as the rows ask, every cell they are put through is kept, and what disturbs a cell
//! is noticed.
//!
//! Runs on the main thread; a broker lives as long as its [`Round`]. Invariants: one broker at a time; each starts on
//! an empty directory, gets the same warm-up and is gone with its data before the next one starts; a cell during which
//! something else used the machine is run again once, and says so if that did not help.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::LogConfig;
use super::figure::{Figure, Measure, Samples};
use super::variant::{KAFKA, KAFKA_FLUSH, Variant};
use crate::consume::ConsumeResult;
use crate::load::{self, LoadConfig, LoadResult, Slice};
use crate::peer::{Peer, Side};
use crate::stats::{self, Machine, NOISE_MAX};
use crate::tail;

/// What all brokers' files together may take at any time.
const DISK_BYTES_MAX: u64 = 30 << 30;
/// A cell that was disturbed is run once more; a machine that is always busy would otherwise never let a row end.
const ATTEMPTS_MAX: u32 = 2;
/// How often the machine is looked at while a quiet moment is awaited.
const QUIET_STEP: Duration = Duration::from_millis(500);
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(5);

/// Flumen's own counters (`flumen_storage_*`), summed over its shards.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Storage {
    pub wal_bytes: f64,
    pub wal_commits: f64,
    pub segment_bytes: f64,
    pub appended_bytes: f64,
    pub cache_bytes: f64,
}

impl Storage {
    fn since(self, earlier: Storage) -> Storage {
        Storage {
            wal_bytes: self.wal_bytes - earlier.wal_bytes,
            wal_commits: self.wal_commits - earlier.wal_commits,
            segment_bytes: self.segment_bytes - earlier.segment_bytes,
            appended_bytes: self.appended_bytes - earlier.appended_bytes,
            cache_bytes: self.cache_bytes,
        }
    }

    /// Bytes written by byte appended.
    pub fn amplification(&self) -> Option<f64> {
        (self.appended_bytes > 0.0).then(|| (self.wal_bytes + self.segment_bytes) / self.appended_bytes)
    }

    pub fn parse(text: &str) -> Storage {
        let sum = |name: &str| -> f64 {
            let of =
                |l: &str| l.strip_prefix(name)?.strip_prefix('{')?.split_once("} ")?.1.trim().parse().ok();
            text.lines().filter_map(|l| -> Option<f64> { of(l) }).sum()
        };
        Storage {
            wal_bytes: sum("flumen_storage_wal_bytes_total"),
            wal_commits: sum("flumen_storage_wal_commits_total"),
            segment_bytes: sum("flumen_storage_segment_bytes_total"),
            appended_bytes: sum("flumen_storage_appended_bytes_total"),
            cache_bytes: sum("flumen_storage_cache_bytes"),
        }
    }
}

/// One cell of one round, with everything raw.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    pub row: u8,
    pub cell: String,
    pub variant: &'static str,
    pub round: usize,
    pub load: LoadResult,
    pub tail: Option<ConsumeResult>,
    pub storage: Option<Storage>,
    /// Share of the machine that something else used.
    pub foreign_share: f64,
    pub disturbed: bool,
    pub attempts: u32,
}

impl Measured {
    /// Something that was sent was refused or never answered.
    pub fn failed(&self) -> bool {
        !self.load.errors.is_empty() || self.load.unanswered > 0
    }
}

/// A figure that is not a load: one value per round.
#[derive(Debug, Clone, Serialize)]
pub struct Reading {
    pub row: u8,
    pub name: String,
    pub variant: &'static str,
    pub round: usize,
    pub value: f64,
}

pub struct Session<'c> {
    pub config: &'c LogConfig,
    pub work: PathBuf,
    pub machine: Machine,
    pub began: Instant,
    pub measured: Vec<Measured>,
    pub readings: Vec<Reading>,
    /// Drains with their progress, by what they are.
    pub drains: Vec<(String, ConsumeResult)>,
    pub producers: Vec<(String, LoadResult)>,
    /// Kafka's saturation rates, found once: (variant, batches a second).
    maxima: Vec<(&'static str, f64)>,
}

impl<'c> Session<'c> {
    pub fn new(config: &'c LogConfig) -> Result<Self> {
        std::fs::create_dir_all(&config.work)
            .with_context(|| format!("cannot create {}", config.work.display()))?;
        let work = config.work.canonicalize()?;
        let machine = stats::machine(&work);
        Ok(Self {
            config,
            work,
            machine,
            began: Instant::now(),
            measured: Vec::new(),
            readings: Vec::new(),
            drains: Vec::new(),
            producers: Vec::new(),
            maxima: Vec::new(),
        })
    }

    pub fn say(&self, text: &str) {
        println!("[{:>5.0} s] {text}", self.began.elapsed().as_secs_f64());
    }

    /// A B B A, then the null broker where the row has it; A B when quick.
    pub fn order(&self, with_null: bool) -> Vec<Side> {
        let pairs: &[Side] = if self.config.quick {
            &[Side::Flumen, Side::Kafka]
        } else {
            &[Side::Flumen, Side::Kafka, Side::Kafka, Side::Flumen]
        };
        let mut order = pairs.repeat(self.config.repeat.max(1));
        order.extend(with_null.then_some(Side::Null));
        order
    }

    /// Puts each broker in turn through `cells`, on an empty directory and warm.
    pub fn rounds(
        &mut self,
        row: u8,
        with_null: bool,
        settings: impl Fn(Side) -> Vec<String>,
        mut cells: impl FnMut(&mut Round<'_, 'c>) -> Result<()>,
    ) -> Result<()> {
        for (i, side) in self.order(with_null).into_iter().enumerate() {
            let mut round = self.begin(row, i + 1, side, &settings(side))?;
            round.warm_up()?;
            let outcome = cells(&mut round);
            outcome.map_err(|e| round.with_words(e))?;
        }
        Ok(())
    }

    pub fn begin(
        &mut self,
        row: u8,
        number: usize,
        side: Side,
        settings: &[String],
    ) -> Result<Round<'_, 'c>> {
        let c = &self.config.sides;
        let mut peer = match side {
            Side::Flumen => Peer::flumen(&c.flumen, &self.work, settings)?,
            Side::Kafka => Peer::kafka(&c.bench_dir, c.kafka_dir.as_deref(), &self.work, settings)?,
            Side::Null => Peer::null(&self.work)?,
        };
        let started = peer.first_ack().with_context(|| format!("{side:?} did not start"))?;
        self.say(&format!("row {row}, round {number}: {side:?} up in {:.2} s", started.as_secs_f64()));
        Ok(Round { session: self, row, number, side, peer, started })
    }

    /// Kafka's batches a second at saturation: 50 connections, 5 in flight, one-record batches of 1 KiB, 100 partitions.
    pub fn kafka_max(&mut self, variant: &Variant) -> Result<f64> {
        if let Some((_, rate)) = self.maxima.iter().find(|(name, _)| *name == variant.name) {
            return Ok(*rate);
        }
        let cell = LoadConfig { in_flight: 5, ..self.shape() };
        {
            let mut round = self.begin(0, 1, Side::Kafka, &[])?;
            round.warm_up()?;
            for v in [KAFKA, KAFKA_FLUSH] {
                let outcome = round.load("maximum", &v, cell.clone()).map(|_| ());
                outcome.map_err(|e| round.with_words(e))?;
            }
        }
        for v in [KAFKA, KAFKA_FLUSH] {
            let rate = self.samples(0, "maximum", &v, Measure::BatchesPerS).figure().context("no maximum")?;
            self.say(&format!("{}'s maximum in this session: {:.0} batches/s", v.name, rate.value));
            self.maxima.push((v.name, rate.value));
        }
        self.kafka_max(variant)
    }

    pub fn maxima(&self) -> &[(&'static str, f64)] {
        &self.maxima
    }

    pub fn shape(&self) -> LoadConfig {
        LoadConfig {
            seconds: self.config.seconds(),
            warmup_seconds: self.config.warmup_seconds(),
            ..LoadConfig::one_record_batches()
        }
    }

    pub fn cells(&self, row: u8, cell: &str, variant: &Variant) -> impl Iterator<Item = &Measured> {
        let cell = cell.to_string();
        let name = variant.name;
        self.measured.iter().filter(move |m| m.row == row && m.cell == cell && m.variant == name)
    }

    /// Slices of all rounds of a cell, read by `measure`.
    pub fn samples(&self, row: u8, cell: &str, variant: &Variant, measure: Measure) -> Samples<'_> {
        let slices: Vec<&Slice> = self.cells(row, cell, variant).flat_map(|m| &m.load.slices).collect();
        Samples::Slices(slices, measure)
    }

    pub fn failures(&self, row: u8) -> usize {
        self.measured.iter().filter(|m| m.row == row && m.failed()).count()
    }

    pub fn figure(&self, row: u8, cell: &str, variant: &Variant, measure: Measure) -> Option<Figure> {
        self.samples(row, cell, variant, measure).figure()
    }

    pub fn values(&self, row: u8, name: &str, variant: &Variant) -> Samples<'static> {
        let of = |r: &&Reading| r.row == row && r.name == name && r.variant == variant.name;
        Samples::Values(self.readings.iter().filter(of).map(|r| r.value).collect())
    }
}

/// A broker that is up, in its turn.
pub struct Round<'s, 'c> {
    pub session: &'s mut Session<'c>,
    pub row: u8,
    pub number: usize,
    pub side: Side,
    pub peer: Peer,
    pub started: Duration,
}

impl Round<'_, '_> {
    pub fn with_words(&self, error: anyhow::Error) -> anyhow::Error {
        anyhow::anyhow!("{:?}: {error:#}\nthe broker's last words:\n{}", self.side, self.peer.log_tail())
    }

    /// The variants of this side, the other way round in every second round, so that none is always the first.
    pub fn mine(&self, variants: &[Variant]) -> Vec<Variant> {
        let mut mine: Vec<_> = variants.iter().copied().filter(|v| v.side == self.side).collect();
        if self.number.is_multiple_of(4) || self.number % 4 == 3 {
            mine.reverse();
        }
        mine
    }

    /// Load before the first cell: a JVM compiles, a log fills its first files.
    pub fn warm_up(&mut self) -> Result<()> {
        let config = LoadConfig {
            topic: "warm-up".into(),
            in_flight: 5,
            seconds: self.session.config.first_warmup(self.side),
            warmup_seconds: 0.0,
            ..self.shape()
        };
        load::run(&config, None).context("warm-up")?;
        Ok(())
    }

    pub fn shape(&self) -> LoadConfig {
        LoadConfig { bootstrap: self.peer.kafka.clone(), pids: vec![self.peer.pid()], ..self.session.shape() }
    }

    pub fn storage(&self) -> Result<Option<Storage>> {
        let Some(admin) = &self.peer.admin else { return Ok(None) };
        let agent: ureq::Agent =
            ureq::Agent::config_builder().timeout_global(Some(SCRAPE_TIMEOUT)).build().into();
        let url = format!("http://{admin}/metrics");
        let text = agent.get(&url).call().with_context(|| url.clone())?.body_mut().read_to_string()?;
        Ok(Some(Storage::parse(&text)))
    }

    /// Waits a bounded time for a moment in which nothing but the broker and this process uses the machine.
    fn await_quiet(&self) -> Result<()> {
        let began = Instant::now();
        let cores = self.session.machine.cores as f64;
        let look = || -> Result<(f64, Instant)> {
            let ours = stats::cpu(self.peer.pid())?.total() + stats::cpu(std::process::id())?.total();
            let host = stats::host();
            Ok((host.busy_s + host.steal_s - ours - stats::kernel_threads_cpu_s(), Instant::now()))
        };
        while began.elapsed().as_secs_f64() < self.session.config.quiet_wait {
            let (before, at) = look()?;
            std::thread::sleep(QUIET_STEP);
            let (after, now) = look()?;
            if (after - before) / ((now - at).as_secs_f64() * cores) <= NOISE_MAX {
                break;
            }
        }
        Ok(())
    }

    /// One cell. `config` says what differs from [`Session::shape`]; broker, topic and durability are filled in here.
    pub fn load(&mut self, cell: &str, variant: &Variant, config: LoadConfig) -> Result<&Measured> {
        self.cell(cell, variant, config, &[], false)
    }

    pub fn load_with_tail(&mut self, cell: &str, variant: &Variant, config: LoadConfig) -> Result<&Measured> {
        self.cell(cell, variant, config, &[], true)
    }

    pub fn cell(
        &mut self,
        cell: &str,
        variant: &Variant,
        config: LoadConfig,
        topic_configs: &[(&str, String)],
        with_tail: bool,
    ) -> Result<&Measured> {
        let config = LoadConfig {
            bootstrap: self.peer.kafka.clone(),
            pids: vec![self.peer.pid()],
            topic: topic_name(cell, variant),
            topic_configs: if self.side == Side::Null {
                vec![]
            } else {
                variant.topic_configs(topic_configs)
            },
            ..config
        };
        let mut best: Option<Measured> = None;
        let mut attempts = 0;
        while attempts < ATTEMPTS_MAX && best.as_ref().is_none_or(|b| b.disturbed) {
            attempts += 1;
            self.check_disk()?;
            self.await_quiet()?;
            let before = self.storage()?;
            let (load, tail) = if with_tail {
                let (load, tail) = tail::with_tail(&config)?;
                (load, Some(tail))
            } else {
                (load::run(&config, None)?, None)
            };
            let storage = before.zip(self.storage()?).map(|(b, a)| a.since(b));
            let foreign_share = load.foreign_share(self.session.machine.cores);
            let measured = Measured {
                row: self.row,
                cell: cell.to_string(),
                variant: variant.name,
                round: self.number,
                load,
                tail,
                storage,
                foreign_share,
                disturbed: foreign_share > NOISE_MAX,
                attempts,
            };
            self.session.say(&format!("  {}", super::report::progress(&measured)));
            if best.as_ref().is_none_or(|b| measured.foreign_share < b.foreign_share) {
                best = Some(measured);
            }
        }
        let mut best = best.context("a cell is tried at least once")?;
        best.attempts = attempts;
        self.session.measured.push(best);
        self.session.measured.last().context("just pushed")
    }

    pub fn reading(&mut self, name: &str, variant: &Variant, value: f64) {
        let (row, round) = (self.row, self.number);
        self.session.readings.push(Reading { row, name: name.into(), variant: variant.name, round, value });
    }

    /// Writes `batches` batches of `records` records of 1 KiB as fast as they are taken; nothing of it is measured.
    /// Returns how many were acknowledged.
    pub fn fill(
        &mut self,
        topic: &str,
        variant: &Variant,
        partitions: usize,
        batches: u64,
        records: usize,
    ) -> Result<u64> {
        let config = LoadConfig {
            topic: topic.into(),
            partitions,
            connections: 16,
            in_flight: 5,
            batch_records: records,
            seconds: FILL_SECONDS_MAX,
            warmup_seconds: 0.0,
            batches: Some(batches),
            topic_configs: variant.topic_configs(&[]),
            ..self.shape()
        };
        let r = load::run(&config, None).context("filling")?;
        if !r.errors.is_empty() || r.acknowledged_batches < batches {
            bail!("only {} of {batches} batches were taken: {:?}", r.acknowledged_batches, r.errors);
        }
        self.check_disk()?;
        self.session.say(&format!(
            "  filled {} MB into {partitions} partitions at {:.0} MB/s ({})",
            (r.mean_batch_bytes * r.acknowledged_batches as f64 / 1e6) as u64,
            r.mb_per_s,
            variant.name
        ));
        Ok(r.acknowledged_batches)
    }

    /// Gives every partition of a topic some batches: a broker that makes files at the first append (Kafka needs some ten
    /// milliseconds for each) is not measured while it does.
    pub fn touch(&mut self, cell: &str, variant: &Variant, partitions: usize) -> Result<()> {
        const CONNECTIONS: usize = 4;
        let config = LoadConfig {
            topic: topic_name(cell, variant),
            partitions,
            connections: CONNECTIONS,
            in_flight: 5,
            // Twice what lies between two entries of Kafka's index, whose first entry is the expensive one.
            record_bytes: 8 << 10,
            partitions_per_request: 50,
            seconds: FILL_SECONDS_MAX,
            warmup_seconds: 0.0,
            // So many that at least one connection has gone through all of them.
            batches: Some((CONNECTIONS * partitions) as u64),
            topic_configs: variant.topic_configs(&[]),
            ..self.shape()
        };
        let began = Instant::now();
        let r = load::run(&config, None).context("first batches")?;
        if !r.errors.is_empty() {
            bail!("first batches of {partitions} partitions: {:?}", r.errors);
        }
        let took = began.elapsed().as_secs_f64();
        self.session.say(&format!(
            "  {partitions} partitions made and written to for the first time in {took:.1} s ({})",
            variant.name
        ));
        Ok(())
    }

    fn check_disk(&self) -> Result<()> {
        let used = allocated_bytes(self.peer.data());
        if used > DISK_BYTES_MAX {
            bail!("{} holds {} GB, more than a session may use", self.peer.data().display(), used >> 30);
        }
        Ok(())
    }
}

pub fn topic_name(cell: &str, variant: &Variant) -> String {
    format!("{}-{}", cell.replace(|c: char| !c.is_ascii_alphanumeric(), "-"), variant.slug())
}

/// Far more than any fill takes; a broker that is slower than this is broken.
const FILL_SECONDS_MAX: f64 = 600.0;

/// Blocks in use below a directory; files that go while they are counted count as nothing.
pub fn allocated_bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|e| match e.metadata() {
            Ok(m) if m.is_dir() => allocated_bytes(&e.path()),
            Ok(m) => m.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_counters_are_summed_over_shards() {
        let text = "# HELP flumen_storage_wal_bytes_total x\n\
            flumen_storage_wal_bytes_total{shard=\"0\"} 100\n\
            flumen_storage_wal_bytes_total{shard=\"1\"} 50\n\
            flumen_storage_segment_bytes_total{shard=\"0\"} 50\n\
            flumen_storage_appended_bytes_total{shard=\"0\"} 100\n\
            flumen_storage_cache_bytes{shard=\"0\"} 7\n";
        let s = Storage::parse(text);
        assert_eq!((s.wal_bytes, s.segment_bytes, s.cache_bytes), (150.0, 50.0, 7.0));
        assert_eq!(s.amplification(), Some(2.0));
        assert_eq!(Storage::default().amplification(), None);
    }

    #[test]
    fn a_directory_is_as_large_as_its_blocks() {
        let dir = std::env::temp_dir().join(format!("flumen-bench-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("a")).unwrap();
        std::fs::write(dir.join("a/b"), vec![1u8; 100_000]).unwrap();
        let bytes = allocated_bytes(&dir);
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(bytes >= 100_000, "{bytes}");
        assert_eq!(allocated_bytes(&dir), 0);
    }
}
