//! `flumen debug`: tools for a data directory whose broker is stopped.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, Subcommand};
use flumen_storage::{DumpOptions, Inspection, OpenError, Severity};

use super::Failure;
use super::recover::{self, RecoverArgs};

#[derive(Args)]
pub struct DebugArgs {
    #[command(subcommand)]
    command: DebugCommand,
}

#[derive(Subcommand)]
enum DebugCommand {
    /// Read a data directory's segments and write-ahead log; its broker must be stopped
    #[command(subcommand)]
    Log(LogCommand),
    /// Let what is left go on when a majority of the nodes is lost for good; says first what may be lost
    Recover(RecoverArgs),
}

#[derive(Subcommand)]
enum LogCommand {
    /// Check every checksum, offset and index; exit status 1 when anything is damaged
    Verify {
        /// The broker's --data-dir
        data_dir: PathBuf,
        /// Also what a crash leaves and the next start deals with
        #[arg(long)]
        all: bool,
    },
    /// Print batches: flumen debug log dump DIR --partition orders-0 --records
    Dump {
        /// The broker's --data-dir
        data_dir: PathBuf,
        /// <topic>-<partition>; all when absent
        #[arg(short, long)]
        partition: Option<String>,
        /// Skip segments that end before this offset
        #[arg(long, default_value_t = 0)]
        from_offset: i64,
        /// Every record's offset, time and sizes
        #[arg(short, long)]
        records: bool,
        /// With --records: keys and values too
        #[arg(long, requires = "records")]
        print_data_log: bool,
        /// The write-ahead log in place of the segments
        #[arg(long, conflicts_with_all = ["partition", "from_offset"])]
        wal: bool,
    },
}

pub fn run(args: DebugArgs) -> Result<(), Failure> {
    let command = match args.command {
        DebugCommand::Log(command) => command,
        DebugCommand::Recover(args) => return recover::run(args),
    };
    let failure = |error: OpenError| match error {
        OpenError::NotOurs { path } => {
            Failure::new(format!("{path}: has no FORMAT file, so it is no broker's data directory"))
        }
        OpenError::NotADirectory { path } => Failure::new(format!("{path}: not a directory")),
        other => Failure::new(other.to_string()),
    };
    match command {
        LogCommand::Verify { data_dir, all } => {
            let started = Instant::now();
            let inspection = Inspection::open(&data_dir).map_err(failure)?;
            let mut print = |finding: flumen_storage::Finding| {
                let severity = match finding.severity {
                    Severity::Damage => "DAMAGED",
                    Severity::Rebuilt => "rebuilt",
                    Severity::Normal if all => "normal",
                    Severity::Normal => return,
                };
                let place = finding.position.map_or(String::new(), |at| format!(" at byte {at}"));
                out!("{severity:8} {}{place}: {}", finding.path.display(), finding.what);
            };
            let found = inspection.verify(&mut print).map_err(failure)?;
            out!(
                "{} partitions, {} segments, {} batches, {} records, {:.1} MiB; {} index entries, {} producer snapshots; \
                 WAL: {} commits that count, {} entries not in segments yet; {:.1} s",
                found.partitions,
                found.segments,
                found.batches,
                found.records,
                found.segment_bytes as f64 / f64::from(1 << 20),
                found.index_entries,
                found.snapshots,
                found.wal_commits,
                found.unflushed_entries,
                started.elapsed().as_secs_f64()
            );
            match (found.damaged, found.rebuilt) {
                (0, 0) => out!("everything is whole"),
                (0, rebuilt) => {
                    out!("all records are whole; {rebuilt} index or snapshot files will be made again")
                }
                (damaged, _) => return Err(Failure::new(format!("{damaged} places are damaged"))),
            }
            Ok(())
        }
        LogCommand::Dump { data_dir, partition, from_offset, records, print_data_log, wal } => {
            let options = DumpOptions { partition, from_offset, records, values: print_data_log, wal };
            let inspection = Inspection::open(&data_dir).map_err(failure)?;
            let print = &mut |line: String| {
                out!("{line}");
                true
            };
            inspection.dump(&options, print).map_err(failure)
        }
    }
}
