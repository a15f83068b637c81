//! `log`: the log against Apache Kafka and the null broker, row by row, each row with its goals.
//!
//! `session` starts brokers and runs cells, `figure` turns slices into medians with intervals, `report` prints, `rows_*`
//! say what each row does. What the rows mean is in `bench/README.md`.

pub mod figure;
pub mod report;
mod rows_client;
mod rows_cost;
mod rows_drain;
mod rows_latency;
mod rows_partitions;
mod rows_start;
pub mod session;
pub mod variant;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use crate::load;
use crate::peer::{Side, Sides};
use crate::stats::Machine;
use report::Verdict;
use session::{Measured, Reading, Session};

#[derive(Debug, Clone, Args, Serialize)]
pub struct LogConfig {
    #[command(flatten)]
    #[serde(flatten)]
    pub sides: Sides,
    /// Where brokers keep their data: one file system for all of them, up to 30 GB at a time.
    #[arg(long, default_value = ".cache/bench-log")]
    pub work: PathBuf,
    /// Raw figures, as JSON; written anew after every row.
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Rows to run, in this order; all when absent.
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<u8>,
    /// Print the rows with how long each takes, and end.
    #[arg(long)]
    pub list: bool,
    /// Short windows, A B instead of A B B A, smaller backlogs.
    #[arg(long)]
    pub quick: bool,
    /// Kafka, too, with 10,000 partitions (rows 9 and 12): a quarter of an hour more.
    #[arg(long)]
    pub full: bool,
    /// Measured seconds of every cell.
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Seconds of load before Kafka's first cell; Flumen gets half of it.
    #[arg(long)]
    pub first_warmup: Option<f64>,
    /// Blocks of A B B A.
    #[arg(long, default_value_t = 1)]
    pub repeat: usize,
    /// Seconds to wait for a quiet machine before a cell.
    #[arg(long, default_value_t = 15.0)]
    pub quiet_wait: f64,
    /// Exit with 1 when a goal is missed.
    #[arg(long)]
    pub check: bool,
}

impl LogConfig {
    pub fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 3.0 } else { 8.0 })
    }

    pub fn warmup_seconds(&self) -> f64 {
        if self.quick { 1.0 } else { 2.0 }
    }

    /// A JVM compiles meanwhile; a broker that was compiled before has only files to fill and gets half of it.
    pub fn first_warmup(&self, side: Side) -> f64 {
        let kafka = self.first_warmup.unwrap_or(if self.quick { 6.0 } else { 10.0 });
        match side {
            Side::Kafka => kafka,
            Side::Flumen => kafka / 2.0,
            // Nothing to warm up but its sockets.
            Side::Null => 1.0,
        }
    }

    /// Seconds that rounds of so many cells take, for the estimate of a row.
    fn estimate(&self, flumen_cells: f64, kafka_cells: f64, null_cells: f64) -> f64 {
        let pairs = if self.quick { 1.0 } else { 2.0 } * self.repeat.max(1) as f64;
        let cell = self.seconds() + self.warmup_seconds() + CELL_OVERHEAD_S;
        let round = |side: Side, cells: f64| match cells {
            0.0 => 0.0,
            _ if side == Side::Kafka => KAFKA_START_S + self.first_warmup(side) + cells * cell,
            _ => self.first_warmup(side) + cells * cell,
        };
        pairs * (round(Side::Flumen, flumen_cells) + round(Side::Kafka, kafka_cells))
            + round(Side::Null, null_cells)
    }
}

/// Looking for a quiet moment, making a topic, reading `/proc`.
const CELL_OVERHEAD_S: f64 = 1.0;
/// Formatting and starting; the figure that counts is measured, this one is for the estimate.
const KAFKA_START_S: f64 = 7.0;

pub struct Row {
    pub number: u8,
    pub title: &'static str,
    /// About how many seconds it takes.
    pub estimate: fn(&LogConfig) -> f64,
    pub run: fn(&mut Session<'_>) -> Result<Vec<Verdict>>,
}

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    rows.extend(rows_cost::rows());
    rows.extend(rows_latency::rows());
    rows.extend(rows_partitions::rows());
    rows.extend(rows_drain::rows());
    rows.extend(rows_start::rows());
    rows.extend(rows_client::rows());
    rows.sort_by_key(|r| r.number);
    rows
}

#[derive(Serialize)]
struct RowTime {
    row: u8,
    title: &'static str,
    seconds: f64,
    failed: Option<String>,
}

#[derive(Serialize)]
struct Report<'a> {
    unix_ms: i64,
    machine: &'a Machine,
    config: &'a LogConfig,
    durability: Vec<(&'static str, &'static str)>,
    kafka_maximum_batches_per_s: &'a [(&'static str, f64)],
    rows: &'a [RowTime],
    verdicts: &'a [Verdict],
    cells: &'a [Measured],
    readings: &'a [Reading],
    drains: &'a [(String, crate::consume::ConsumeResult)],
    producers_beside_drains: &'a [(String, load::LoadResult)],
}

pub fn run(config: &LogConfig) -> Result<ExitCode> {
    let all = rows();
    let chosen: Vec<&Row> = if config.only.is_empty() {
        all.iter().collect()
    } else {
        let find =
            |n: &u8| all.iter().find(|r| r.number == *n).with_context(|| format!("there is no row {n}"));
        config.only.iter().map(find).collect::<Result<_>>()?
    };
    let total: f64 = chosen.iter().map(|r| (r.estimate)(config)).sum();
    if config.list {
        for r in &chosen {
            println!("{:>3}  {:>5.0} s  {}", r.number, (r.estimate)(config), r.title);
        }
        println!("{:>3}  {total:>5.0} s  in all", "");
        return Ok(ExitCode::SUCCESS);
    }
    config.sides.ensure_built()?;
    let mut session = Session::new(config)?;
    let m = &session.machine;
    println!(
        "{}, {} cores, {} GiB, Linux {}, data on {}; about {:.0} minutes",
        m.cpu,
        m.cores,
        m.memory_gib,
        m.kernel,
        m.data_filesystem,
        (total / 60.0).max(1.0)
    );
    if m.data_filesystem == "tmpfs" {
        println!("warning: {} is memory; durability costs nothing there", session.work.display());
    }
    let mut times: Vec<RowTime> = Vec::new();
    let mut verdicts: Vec<Verdict> = Vec::new();
    for row in chosen {
        session.say(&format!("row {}: {} (about {:.0} s)", row.number, row.title, (row.estimate)(config)));
        let began = Instant::now();
        let outcome = (row.run)(&mut session).with_context(|| format!("row {}", row.number));
        let seconds = began.elapsed().as_secs_f64();
        let failed = match outcome {
            Ok(mut v) => {
                if session.failures(row.number) > 0 {
                    v.iter_mut().for_each(Verdict::spoil);
                }
                report::print_cells(&session, row.number);
                report::print_verdicts(&v);
                verdicts.extend(v);
                None
            }
            // The rows after it still say something; the end says that this one failed.
            Err(e) => {
                println!("row {} FAILED: {e:#}", row.number);
                Some(format!("{e:#}"))
            }
        };
        session.say(&format!("row {} took {seconds:.0} s", row.number));
        times.push(RowTime { row: row.number, title: row.title, seconds, failed });
        if let Some(out) = &config.out {
            let report = Report {
                unix_ms: load::now_ms(),
                machine: &session.machine,
                config,
                durability: variant::ALL.iter().map(|v| (v.name, v.promise)).collect(),
                kafka_maximum_batches_per_s: session.maxima(),
                rows: &times,
                verdicts: &verdicts,
                cells: &session.measured,
                readings: &session.readings,
                drains: &session.drains,
                producers_beside_drains: &session.producers,
            };
            crate::write_json(Some(out), &report)?;
        }
    }
    finish(&session, &times, &verdicts);
    let failed = times.iter().any(|t| t.failed.is_some());
    let missed = verdicts.iter().any(Verdict::missed);
    Ok(if failed || (config.check && missed) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn finish(session: &Session<'_>, times: &[RowTime], verdicts: &[Verdict]) {
    println!();
    report::print_verdicts(verdicts);
    println!();
    for v in variant::ALL {
        println!("{}: {}", v.name, v.promise);
    }
    for (name, rate) in session.maxima() {
        println!("{name}: {rate:.0} batches/s at most in this session (50 connections, 5 in flight, 1 KiB)");
    }
    for t in times.iter().filter(|t| t.failed.is_some()) {
        println!("row {} FAILED: {}", t.row, t.failed.as_deref().unwrap_or_default());
    }
    for m in session.measured.iter().filter(|m| m.failed()) {
        let l = &m.load;
        println!(
            "row {} {} ({}): errors {:?}, unanswered {}",
            m.row, m.cell, m.variant, l.errors, l.unanswered
        );
    }
    let disturbed: Vec<String> = session
        .measured
        .iter()
        .filter(|m| m.disturbed)
        .map(|m| format!("row {} {} ({}) {:.0} %", m.row, m.cell, m.variant, m.foreign_share * 100.0))
        .collect();
    if !disturbed.is_empty() {
        println!(
            "disturbed in every attempt, to be run again before they are believed: {}",
            disturbed.join("; ")
        );
    }
    let took = Duration::from_secs_f64(times.iter().map(|t| t.seconds).sum());
    println!("took {:.1} minutes", took.as_secs_f64() / 60.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_numbered_from_one_without_a_gap() {
        let numbers: Vec<u8> = rows().iter().map(|r| r.number).collect();
        assert_eq!(numbers, (1..=13).collect::<Vec<u8>>());
    }
}
