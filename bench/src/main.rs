//! `flumen-bench`: load generator, null broker, consumer, and the comparison with Apache Kafka.
//!
//! Every subcommand runs on threads of its own and says on stdout what it measured; raw figures go to `--json`.
#![forbid(unsafe_code)]

mod batch;
mod client;
mod cluster;
mod consume;
mod export;
mod load;
mod log;
mod null;
mod outbox;
mod pace;
mod peer;
mod plan;
mod route;
mod smoke;
mod stats;
mod tail;
mod wire;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde::Serialize;

#[derive(Parser)]
#[command(
    name = "flumen-bench",
    version,
    about = "Load generator and comparison for brokers that speak Kafka"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// A broker that acknowledges and stores nothing: the floor of every figure.
    Null(null::NullConfig),
    /// Produce pre-encoded batches over many connections.
    Load {
        #[command(flatten)]
        config: load::LoadConfig,
        /// Write every figure here as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Fetch, tailing or draining.
    Consume {
        #[command(flatten)]
        config: consume::ConsumeConfig,
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Records to rows in ClickHouse: rows/s, CPU and visibility, on a broker that runs already.
    Export {
        #[command(flatten)]
        config: export::ExportConfig,
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Flumen, Apache Kafka and the null broker in one session, and one table.
    Smoke(smoke::SmokeConfig),
    /// The log against Apache Kafka, row by row, with goals.
    Log(log::LogConfig),
    /// Three nodes against three of Apache Kafka, replication factor 3.
    Cluster(cluster::ClusterConfig),
}

fn write_json(path: Option<&Path>, value: &impl Serialize) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let mut text = serde_json::to_string_pretty(value)?;
    text.push('\n');
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("flumen-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    match Cli::parse().command {
        Command::Null(config) => null::run(&config)?,
        Command::Load { config, json } => {
            let result = load::run(&config, None)?;
            load::print(&result);
            write_json(json.as_deref(), &result)?;
        }
        Command::Consume { config, json } => {
            let r = consume::run(&config, None)?;
            println!(
                "{:.1} MB/s  {} records  {:.0} bytes/fetch  {:.2} s",
                r.mb_per_s, r.records, r.mean_fetch_bytes, r.seconds
            );
            if let Some(c) = r.broker_cpu_s_per_gb {
                println!("broker {c:.3} CPU-s per GB");
            }
            write_json(json.as_deref(), &r)?;
        }
        Command::Export { config, json } => {
            let r = export::run(&config)?;
            export::print(&r);
            write_json(json.as_deref(), &r)?;
        }
        Command::Smoke(config) => return smoke::run(&config),
        Command::Log(config) => return log::run(&config),
        Command::Cluster(config) => return cluster::run(&config),
    }
    Ok(ExitCode::SUCCESS)
}
