//! The command line. `server` and `clickhouse` run a process; everything else asks a running one
//! through the admin API, so that it can be done from another machine with the same words. Only `debug` reads files.
//!
//! Exit status: 0 done, 1 failed, 2 wrong usage, 3 not found, 10 unhealthy.

/// Prints a line; ends quietly when the reader has gone (`flumen topic list | head`).
macro_rules! out {
    ($($arg:tt)*) => {{
        use std::io::Write;
        if writeln!(std::io::stdout(), $($arg)*).is_err() {
            std::process::exit(0);
        }
    }};
}

mod admin_client;
mod cluster;
mod debug;
mod export;
mod recover;
mod server;
mod table;
mod topic;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub const EXIT_FAILED: u8 = 1;
pub const EXIT_NOT_FOUND: u8 = 3;
pub const EXIT_UNHEALTHY: u8 = 10;

#[derive(Parser)]
#[command(name = "flumen", version, about = "Kafka-compatible broker with ClickHouse built in")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a broker
    Server(server::ServerArgs),
    /// Serve ClickHouse's HTTP interface from the embedded engine (libchdb)
    Clickhouse(server::ClickhouseArgs),
    /// Create, list, describe, alter and delete topics
    Topic(topic::TopicArgs),
    /// Turn export to ClickHouse on and off, and look at it
    Export(export::ExportArgs),
    /// Show what the cluster is, whether it is well, its brokers and its partitions
    Cluster(cluster::ClusterArgs),
    /// Look into a data directory whose broker is stopped
    Debug(debug::DebugArgs),
    /// Print the version
    Version,
}

/// What a command ended with, when not well.
pub struct Failure {
    pub message: String,
    pub exit: u8,
}

impl Failure {
    pub fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), exit: EXIT_FAILED }
    }
}

pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Server(args) => server::server(args),
        Command::Clickhouse(args) => server::clickhouse(args),
        Command::Topic(args) => topic::run(args),
        Command::Export(args) => export::run(args),
        Command::Cluster(args) => cluster::run(args),
        Command::Debug(args) => debug::run(args),
        Command::Version => {
            out!("flumen {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(std::io::stderr(), "error: {}", failure.message);
            ExitCode::from(failure.exit)
        }
    }
}
