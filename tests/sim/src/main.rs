//! `flumen-sim [--shards] SEED [COUNT] [--keep DIR] [--mutant NAME] [--log]`: runs seeds, prints what failed and how to repeat
//! it, keeps its history. `--shards`: whole shards on simulated disks; without it Raft groups with a driver of the simulation.
//! `--log`: what brokers log (RUST_LOG), too.

use std::process::ExitCode;

use flumen_sim::{DRIVER_MUTANTS, Settings, run, shards};

fn main() -> ExitCode {
    let mut numbers = Vec::new();
    let (mut keep, mut mutant, mut of_shards) = (None, None, false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--shards" => of_shards = true,
            "--log" => tracing_subscriber::fmt()
                .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
                .with_writer(std::io::stderr)
                .init(),
            "--keep" => keep = arguments.next(),
            "--mutant" => {
                let name = arguments.next().unwrap_or_default();
                mutant = DRIVER_MUTANTS.into_iter().find(|m| format!("{m:?}") == name);
            }
            other => match other.parse::<u64>() {
                Ok(number) => numbers.push(number),
                Err(_) => {
                    eprintln!(
                        "usage: flumen-sim [--shards] SEED [COUNT] [--keep DIR] [--mutant NAME] [--log]"
                    );
                    return ExitCode::from(2);
                }
            },
        }
    }
    let first = numbers.first().copied().unwrap_or(0);
    let count = numbers.get(1).copied().unwrap_or(1);
    let (mut failed, mut simulated, mut commits) = (0, 0, 0);
    for seed in first..first.saturating_add(count) {
        let settings = Settings { seed, mutant };
        let report = if of_shards { shards::run(settings) } else { run(settings) };
        simulated += report.simulated_ms;
        commits += report.commits;
        if let Some(failure) = report.failure {
            failed += 1;
            println!(
                "seed {seed}: {failure}\n  repeat: flumen-sim {}{seed}",
                if of_shards { "--shards " } else { "" }
            );
            if let Some(dir) = &keep {
                let path = format!("{dir}/seed-{seed}.jsonl");
                match std::fs::write(&path, report.history.to_text()) {
                    Ok(()) => println!("  history: {path}"),
                    Err(error) => eprintln!("{path}: {error}"),
                }
            }
        }
    }
    println!("{count} seeds, {failed} failed, {} s simulated, {commits} entries committed", simulated / 1000);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) }
}
