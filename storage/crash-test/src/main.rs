//! `flumen-crash-test`: seeds one after the other, for as long as one likes; says which one failed and how to repeat it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Parser;
use flumen_crash_test::{Failure, Life, Report};

/// Crash tests of the store on a simulated disk.
#[derive(Debug, Parser)]
struct Args {
    /// First seed.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How many seeds; 0 goes on until it is interrupted or --seconds are over.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// Crashes in the life of each seed. Part of what a seed means.
    #[arg(long, default_value_t = 8)]
    crashes: u64,
    /// Stop after this time.
    #[arg(long, default_value_t = 0)]
    seconds: u64,
    /// Threads; each has seeds of its own.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print the operations on the disk before the failure.
    #[arg(long)]
    log: bool,
    /// Go on after a failure, and print one line for each.
    #[arg(long)]
    keep_going: bool,
}

fn main() {
    let args = Args::parse();
    let start = Instant::now();
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        some => some,
    };
    let end = if args.seeds == 0 { u64::MAX } else { args.seed.saturating_add(args.seeds) };
    let (next, stop) = (AtomicU64::new(args.seed), AtomicBool::new(false));
    let total = Mutex::new((Report::default(), 0u64, Vec::<Box<Failure>>::new()));
    // A panic of the store is reported as a failure of its seed; the default hook would print it once more.
    std::panic::set_hook(Box::new(|_| {}));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed)
                    && (args.seconds == 0 || start.elapsed() < Duration::from_secs(args.seconds))
                {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end {
                        return;
                    }
                    let outcome = Life::run(seed, args.crashes, args.log);
                    let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
                    total.1 += 1;
                    match outcome {
                        Ok(report) => total.0.add(&report),
                        Err(failure) => {
                            println!(
                                "seed {} failed after {} crashes: {}",
                                failure.seed, failure.crashes, failure.reason
                            );
                            if !args.keep_going {
                                stop.store(true, Ordering::Relaxed);
                            }
                            total.2.push(failure);
                        }
                    }
                    if total.1.is_multiple_of(2_000) {
                        println!(
                            "{} seeds, {} crash points, {:.0} s",
                            total.1,
                            total.0.crash_points(),
                            start.elapsed().as_secs_f64()
                        );
                    }
                }
            });
        }
    });
    let (report, seeds, failures) = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{seeds} seeds, {} crash points ({} in recovery), {} clean stops, {} poisonings, {} refusals, {} batches, {} compactions, {:.1} s",
        report.crash_points(),
        report.crashes_in_recovery,
        report.clean_stops,
        report.poisonings,
        report.refusals,
        report.staged,
        report.compactions,
        start.elapsed().as_secs_f64()
    );
    let Some(failure) = failures.iter().min_by_key(|failure| failure.seed) else {
        println!("faults: {}", report.counters);
        for fault in report.counters.missing(&flumen_crash_test::settings::all_rates()) {
            println!("note: {fault:?} never happened in these seeds");
        }
        return;
    };
    if args.log {
        failure.log.iter().for_each(|line| println!("{line}"));
    }
    println!(
        "repeat: flumen-crash-test --seed {} --crashes {} --log      (make crash-test SEED={} N=1)",
        failure.seed, args.crashes, failure.seed
    );
    std::process::exit(1);
}
