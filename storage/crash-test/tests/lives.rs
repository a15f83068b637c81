//! Lives of a data directory through at least ten thousand crashes, and that a life can be lived again.

use std::sync::atomic::{AtomicU64, Ordering};

use flumen_crash_test::{Life, RECEIVES_FROM, REPLICATED_FROM, Report};

/// Crashes in each life; part of what a seed means.
const CRASHES: u64 = 8;

const CRASH_POINTS: u64 = 10_000;

/// Seeds run together: what the machines of continuous integration have at least.
const THREADS: usize = 2;

/// Each of these failed once, for what the line says.
const REGRESSIONS: &[u64] = &[
    132,   // a cut whose place in the segment could not be read was made all the same
    316,   // the same, met at the next start
    302,   // a failed sync of the os lane, and a clean stop that took it for done
    365,   // a file of the os lane retired ahead of what the durable lane still had to write
    530,   // a directory without content, called damaged because an os ring was
    938,   // a marker of damage that could not be written, and was forgotten
    1018,  // the name of a WAL file that a run before had made and not synced
    2042,  // the same, of an os ring
    942,   // a log start that found no room, and a commit that waited for one that was never staged
    3573,  // the same
    1236,  // entries replaced in the os lane, which lost that with the machine's power
    1957,  // a file of the os lane retired before what replaced its entries was in the durable one
    2374,  // a read error while cutting, taken for damage
    2490,  // a producer snapshot of a log that had lost its end
    3398,  // a segment begun on a full disk, left among the others
    3927,  // a producer made of a rotten batch
    313,   // a reader that a cut overtook found its segment short, and the partition refused from then on
    13,    // a deleted partition that the states file had, in a new directory of its name
    40,    // its producers, found beside the clean stop of another of that name
    1290,  // damaged rings put aside by a recovery that did not get to the end
    2717,  // a producer of which a cut had left nothing in memory, compacted away
    1427,  // a directory made with the name of one whose deletion was not sure
    5633,  // a torn block whose checksum did not see states that had changed places
    352,   // a producer whose newest batch was lost, after compaction had taken the one before it
    123,   // index entries of a run that was cut off, and other entries behind them
    1244,  // a compacted segment whose name only the kernel knew, and what it replaced removed
    32,    // a state written while the store stopped, older than the one it stopped with
    217,   // a commit that nobody woke the writer for, on a full disk
    153,   // a log start that was acknowledged and stood in no record
    746,   // a failed sync of one shard that took what another's, under way with it, called safe
    6000,  // a read of entries that retention overtook
    6070,  // producers that a log began with, gone with a later snapshot that Raft cut
    6186,  // entries counted by marks that had gone meanwhile
    7133,  // a state of one lane that knew of a beginning in the other, without its producers
    40212, // a partition that received segments before its creation was sure
    3758,  // a snapshot whose epoch was forgotten with the log start, though its segment was there
    1225,  // an index that named another entry than the count before it took both away
    6075,  // a snapshot of producers below the log start, of entries that a loss of power took, believed
];

fn live(seed: u64) -> Report {
    Life::run(seed, CRASHES, false).unwrap_or_else(|failure| {
        panic!(
            "seed {seed} failed after {} crashes: {}\nrepeat: make crash-test N=1 SEED={seed}",
            failure.crashes, failure.reason
        )
    })
}

#[test]
fn ten_thousand_crashes_keep_every_promise() {
    let (next, points, compactions) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let (begun, received, over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while points.load(Ordering::Relaxed) < CRASH_POINTS {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    // Without members, with them, and with what they receive.
                    let from = [0, REPLICATED_FROM, RECEIVES_FROM][(number % 3) as usize];
                    let report = live(number / 3 + from);
                    received.fetch_add(report.received, Ordering::Relaxed);
                    begun.fetch_add(report.begun, Ordering::Relaxed);
                    over.fetch_add(report.over, Ordering::Relaxed);
                    let lived = report.crash_points();
                    compactions.fetch_add(report.compactions, Ordering::Relaxed);
                    let before = points.fetch_add(lived, Ordering::Relaxed);
                    if before / 2_000 != (before + lived) / 2_000 {
                        println!("{} crash points", before + lived);
                    }
                }
            });
        }
    });
    let (seeds, compactions) = (next.into_inner(), compactions.into_inner());
    println!("{compactions} passes of compaction");
    assert!(compactions > CRASH_POINTS / 20, "compaction hardly ever ran");
    let (begun, received, over) = (begun.into_inner(), received.into_inner(), over.into_inner());
    println!("{begun} logs began anew, {received} with what they received, {over} at nothing");
    assert!(over > CRASH_POINTS / 100, "hardly any log began at nothing");
    assert!(received > CRASH_POINTS / 100, "hardly any log began with what it received");
    assert!(begun > CRASH_POINTS / 20, "hardly any log ever began anew");
    println!("{seeds} seeds, {} crash points", points.into_inner());
    assert!(seeds > CRASH_POINTS / CRASHES / 4, "a life has few more crashes than it was given");
}

#[test]
fn what_failed_once_holds() {
    for seed in REGRESSIONS {
        live(*seed);
    }
}

#[test]
fn a_seed_is_one_run() {
    // One of each theme.
    for seed in
        (5_000..5_008).chain(REPLICATED_FROM..REPLICATED_FROM + 8).chain(RECEIVES_FROM..RECEIVES_FROM + 8)
    {
        let (first, second) = (live(seed), live(seed));
        assert_eq!(first.trace, second.trace, "seed {seed}");
        assert_eq!((first.staged, first.crash_points()), (second.staged, second.crash_points()));
        assert_ne!(first.trace, live(seed + 8).trace);
    }
}
