//! `flumen-micro`: how many instructions the hot paths execute per operation, counted by valgrind.
//!
//! `run` is the program under valgrind: it prepares the same inputs whatever it is asked, then does so many operations.
//! `gate` runs it with many and with none for each operation, subtracts, and compares with the counts of the repository.
//! Instructions are not time, but unlike time they repeat to the last digit or nearly so, on a busy machine too.
#![forbid(unsafe_code)]

mod gate;
mod operations;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Parser)]
#[command(name = "flumen-micro", version, about = "Instructions per operation of the hot paths")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Do one operation so many times.
    Run { operation: String, times: usize },
    /// Count all operations under valgrind and compare with the file; exit 1 when one got dearer.
    Gate {
        /// The counts to compare with.
        #[arg(long, default_value = "bench/results/instructions.json")]
        file: PathBuf,
        /// Write what was counted to the file instead.
        #[arg(long)]
        update: bool,
    },
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("flumen-micro: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    match Cli::parse().command {
        Command::Run { operation, times } => {
            operations::run(&operation, times)?;
            // What was prepared and not used is not taken down: it would be counted for the run that used less.
            std::process::exit(0)
        }
        Command::Gate { file, update } => gate::run(&file, update),
    }
}
