//! What a simulated crash may leave and what it must leave. That the disk behaves as a disk otherwise is the conformance
//! suite's matter.

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::*;
use crate::{AlignedBuf, File, Mode};

const RW: Mode = Mode { write: true, create: true, direct: false, dsync: false };
const WAL: Mode = Mode { write: true, create: true, direct: true, dsync: true };

fn machine(seed: u64) -> Machine {
    Machine::new(seed, Settings { sector_bytes: 512, ..Settings::default() })
}

fn run<F: Future<Output = T>, T>(work: F) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, work)
}

fn path(name: &str) -> PathBuf {
    Path::new("/").join(name)
}

fn open(machine: &Machine, name: &str, mode: Mode) -> File {
    machine.file_system().open(&path(name), mode).unwrap()
}

fn content(machine: &Machine, name: &str) -> Option<Vec<u8>> {
    machine.file_system().read(&path(name)).ok()
}

fn synced(machine: &Machine, name: &str, bytes: &[u8]) -> File {
    let file = open(machine, name, RW);
    file.write_all_at(bytes, 0).unwrap();
    file.sync_data().unwrap();
    machine.file_system().sync_dir(Path::new("/")).unwrap();
    file
}

/// Everything that `after` says over many seeds.
fn outcomes<T: Ord>(after: impl Fn(Machine) -> T) -> BTreeSet<T> {
    (0..200).map(|seed| after(machine(seed))).collect()
}

#[test]
fn what_was_synced_survives_and_the_rest_is_old_or_new_sector_by_sector() {
    let seen = outcomes(|machine| {
        let file = synced(&machine, "a", &[1; 4096]);
        file.write_all_at(&[2; 4096], 0).unwrap();
        machine.crash_now(Crash::PowerLoss);
        machine.restart();
        let bytes = content(&machine, "a").unwrap();
        assert_eq!(bytes.len(), 4096);
        assert!(bytes.iter().all(|byte| matches!(byte, 1 | 2)));
        bytes.chunks(512).map(|sector| sector[0]).collect::<Vec<u8>>()
    });
    assert!(seen.len() > 50, "{}", seen.len());
    assert!(seen.contains(&vec![1; 8]) && seen.contains(&vec![2; 8]));
}

/// An append writes the last block again, with what it held in front.
#[test]
fn a_block_written_again_keeps_what_it_held() {
    let seen = outcomes(|machine| {
        machine.set_rates(Rates { zero: 500_000, garbage: 500_000, ..Rates::default() });
        let mut block = [0; 4096];
        block[..700].fill(1);
        let file = synced(&machine, "a", &block);
        block[700..1_500].fill(2);
        file.write_all_at(&block, 0).unwrap();
        machine.crash_now(Crash::PowerLoss);
        machine.restart();
        let bytes = content(&machine, "a").unwrap();
        assert!(bytes[..700].iter().all(|byte| *byte == 1));
        bytes[700..1_500].iter().all(|byte| *byte == 2)
    });
    assert!(seen.contains(&false), "what came new is as lost as ever");
}

#[test]
fn a_killed_process_loses_nothing_that_the_kernel_had() {
    for seed in 0..50 {
        let machine = machine(seed);
        let file = synced(&machine, "a", &[1; 4096]);
        file.write_all_at(&[2; 4096], 0).unwrap();
        machine.file_system().write(&path("b"), b"not synced").unwrap();
        machine.crash_now(Crash::Kill);
        assert_eq!(machine.restart(), Crash::Kill);
        assert_eq!(content(&machine, "a").unwrap(), [2; 4096]);
        assert_eq!(content(&machine, "b").unwrap(), b"not synced");
    }
}

#[test]
fn lengths_come_back() {
    let seen = outcomes(|machine| {
        let file = synced(&machine, "a", &[1; 3000]);
        file.set_len(1000).unwrap();
        file.write_all_at(&[2; 10], 5000).unwrap();
        machine.crash_now(Crash::PowerLoss);
        machine.restart();
        content(&machine, "a").unwrap().len()
    });
    assert_eq!(seen, BTreeSet::from([1000, 3000, 5010]));
    assert!(machine_counts(|machine| {
        let file = synced(machine, "a", &[1; 3000]);
        file.set_len(1000).unwrap();
    }));
}

fn machine_counts(work: impl Fn(&Machine)) -> bool {
    (0..50).any(|seed| {
        let machine = machine(seed);
        work(&machine);
        machine.crash_now(Crash::PowerLoss);
        machine.restart();
        machine.counters().of(Fault::LengthLost) > 0
    })
}

#[test]
fn names_are_kept_or_lost_until_their_directory_is_synced() {
    let seen = outcomes(|machine| {
        let files = machine.file_system();
        synced(&machine, "old", b"old");
        synced(&machine, "gone", b"gone");
        // Content that is synced under a name that is not.
        let file = open(&machine, "new", RW);
        file.write_all_at(b"new", 0).unwrap();
        file.sync_all().unwrap();
        files.rename(&path("new"), &path("old")).unwrap();
        files.remove_file(&path("gone")).unwrap();
        files.create_dir(&path("dir")).unwrap();
        machine.crash_now(Crash::PowerLoss);
        machine.restart();
        let old = content(&machine, "old").unwrap();
        assert!(old == b"old" || old == b"new", "renaming is all or nothing");
        let files = machine.file_system();
        (
            old == b"new",
            content(&machine, "new").is_some(),
            files.exists(&path("gone")),
            files.is_dir(&path("dir")),
        )
    });
    assert!(seen.len() >= 8, "{seen:?}");
    assert!(seen.contains(&(false, false, true, false)) && seen.contains(&(true, false, false, true)));
    let synced_names = outcomes(|machine| {
        let files = machine.file_system();
        synced(&machine, "a", b"a");
        files.rename(&path("a"), &path("b")).unwrap();
        files.sync_dir(Path::new("/")).unwrap();
        machine.crash_now(Crash::PowerLoss);
        machine.restart();
        (content(&machine, "a"), content(&machine, "b"))
    });
    assert_eq!(synced_names, BTreeSet::from([(None, Some(b"a".to_vec()))]));
}

#[test]
fn a_synchronous_write_is_durable_when_it_returns_and_not_before() {
    let seen = outcomes(|machine| {
        run(async {
            let disk = machine.disk();
            let file = open(&machine, "wal", WAL);
            file.allocate(16 << 10).unwrap();
            file.sync_all().unwrap();
            machine.file_system().sync_dir(Path::new("/")).unwrap();
            let mut buf = AlignedBuf::zeroed(4096);
            buf.fill(1);
            let (mut buf, result) = disk.write_at(&file, buf, 4096, 0).await;
            result.unwrap();
            buf.fill(2);
            machine.crash_after(1, Crash::PowerLoss);
            tokio::select! {
                biased;
                () = machine.down() => {}
                (_, result) = disk.write_at(&file, buf, 4096, 4096) => panic!("{result:?}"),
            }
        });
        machine.restart();
        let bytes = content(&machine, "wal").unwrap();
        assert_eq!(bytes[..4096], [1; 4096]);
        bytes[4096..8192].chunks(512).map(|sector| sector[0]).collect::<Vec<u8>>()
    });
    assert!(seen.len() > 50 && seen.contains(&vec![0; 8]) && seen.contains(&vec![2; 8]));
}

#[test]
fn a_failed_sync_forgets_the_pages_and_the_next_one_succeeds_without_them() {
    let mut lost = 0;
    for seed in 0..50 {
        let machine = machine(seed);
        let file = synced(&machine, "a", &[1; 4096]);
        file.write_all_at(&[2; 4096], 0).unwrap();
        machine.set_rates(Rates { sync_fails: 1_000_000, ..Rates::default() });
        assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(libc::EIO));
        machine.set_rates(Rates::default());
        file.sync_data().unwrap();
        assert_eq!(content(&machine, "a").unwrap(), [2; 4096], "readers see what the cache has");
        machine.crash_now(Crash::PowerLoss);
        machine.restart();
        lost += usize::from(content(&machine, "a").unwrap() != [2; 4096]);
        assert_eq!(machine.counters().of(Fault::SyncFails), 1);
    }
    assert!(lost > 30, "{lost}");
}

#[test]
fn a_sync_covers_what_was_written_before_it_began() {
    let seen = outcomes(|machine| {
        run(async {
            let disk = machine.disk();
            let file = synced(&machine, "a", &[0; 8192]);
            file.write_all_at(&[1; 512], 0).unwrap();
            let sync = disk.fdatasync(&file);
            let write = async { file.write_all_at(&[2; 512], 4096).unwrap() };
            let (result, ()) = tokio::join!(biased; sync, write);
            result.unwrap();
        });
        machine.crash_now(Crash::PowerLoss);
        machine.restart();
        let bytes = content(&machine, "a").unwrap();
        (bytes[0], bytes[4096])
    });
    assert_eq!(seen, BTreeSet::from([(1, 0), (1, 2)]));
}

#[test]
fn a_dead_process_changes_nothing() {
    let machine = machine(3);
    let file = synced(&machine, "a", b"first");
    let files = machine.file_system();
    let held = files.lock(&path("LOCK")).unwrap().unwrap();
    machine.crash_now(Crash::Kill);
    let steps = machine.steps();
    assert!(file.write_all_at(b"dead!", 0).is_err() && file.sync_all().is_err());
    assert!(files.remove_file(&path("a")).is_err() && files.read(&path("a")).is_err());
    assert_eq!(machine.steps(), steps);
    machine.restart();
    assert!(file.write_all_at(b"dead!", 0).is_err() && files.rename(&path("a"), &path("b")).is_err());
    let now = machine.file_system();
    assert_eq!(now.read(&path("a")).unwrap(), b"first");
    let mine = now.lock(&path("LOCK")).unwrap();
    assert!(mine.is_some(), "locks die with their process");
    drop(held);
    assert!(now.lock(&path("LOCK")).unwrap().is_none(), "and what it drops later unlocks nothing");
}

#[test]
fn the_boot_id_changes_with_the_machine_only() {
    let machine = machine(1);
    let first = machine.file_system().boot_id();
    machine.crash_now(Crash::Kill);
    machine.restart();
    assert_eq!(machine.file_system().boot_id(), first);
    machine.crash_now(Crash::PowerLoss);
    machine.restart();
    assert_ne!(machine.file_system().boot_id(), first);
}

#[test]
fn space_runs_out_and_comes_back() {
    let machine = Machine::new(1, Settings { capacity_bytes: 10 * 4096, ..Settings::default() });
    let files = machine.file_system();
    let file = open(&machine, "a", RW);
    let error = file.write_all_at(&[1; 20 * 4096], 0).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert!(file.len().unwrap() < 20 * 4096);
    assert_eq!(files.free_bytes(Path::new("/")).unwrap(), 0);
    assert_eq!(files.create_dir(&path("d")).unwrap_err().kind(), io::ErrorKind::StorageFull);
    // What is there already may be written over.
    file.write_all_at(&[2; 4096], 0).unwrap();
    file.set_len(0).unwrap();
    file.allocate(6 * 4096).unwrap();
    assert_eq!(file.allocate(20 * 4096).unwrap_err().kind(), io::ErrorKind::StorageFull);
    machine.fill_up();
    file.write_all_at(&[3; 4096], 4096).unwrap();
    assert!(files.write(&path("b"), b"x").is_err());
    machine.free_space();
    files.write(&path("b"), b"x").unwrap();
    files.remove_file(&path("a")).unwrap();
    files.write(&path("c"), &[1; 6 * 4096]).unwrap();
}

#[test]
fn damage_is_on_record() {
    let machine = machine(5);
    synced(&machine, "a", &[7; 40_000]);
    machine.flip_a_bit();
    let damage = machine.damage();
    assert_eq!((damage.len(), damage[0].fault, &*damage[0].path), (1, Fault::BitFlip, Path::new("/a")));
    let bytes = content(&machine, "a").unwrap();
    let at = damage[0].at as usize;
    let differs: Vec<usize> = (0..bytes.len()).filter(|at| bytes[*at] != 7).collect();
    // A bit behind the end of the file is nobody's.
    assert!(differs == [at] || at >= bytes.len());
    machine.set_rates(Rates { stray_writes: 1_000_000, ..Rates::default() });
    run(async {
        let file = open(&machine, "b", WAL);
        file.allocate(8192).unwrap();
        let mut buf = AlignedBuf::zeroed(4096);
        buf.fill(9);
        machine.disk().write_at(&file, buf, 4096, 4096).await.1.unwrap();
    });
    let found = machine.damage();
    assert!(found[1..].iter().any(|damage| damage.path == Path::new("/b") && damage.at == 4096));
    assert_eq!(content(&machine, "b").unwrap()[4096..], [0; 4096], "it never arrived");
}

/// A run with everything in it; returns the digest.
fn busy(seed: u64, counters: &mut Counters) -> u64 {
    let rates = Rates {
        sync_fails: 50_000,
        sync_stalls: 20_000,
        write_fails: 20_000,
        read_fails: 50_000,
        no_space: 5_000,
        bit_flips: 10_000,
        stray_writes: 10_000,
        torn: 60_000,
        zero: 60_000,
        garbage: 60_000,
        ruins: 500_000,
        evicted: 500_000,
    };
    let settings = Settings { sector_bytes: 512, stall_ms: 2, rates, log: true, ..Settings::default() };
    let machine = Machine::new(seed, settings);
    let mut random = Random::new(seed ^ 99);
    for _ in 0..6 {
        let crash = if random.below(2) == 0 { Crash::Kill } else { Crash::PowerLoss };
        machine.crash_after(20 + random.below(120), crash);
        run(async {
            let work = async {
                let (files, disk) = (machine.file_system(), machine.disk());
                loop {
                    let name = path(&format!("f{}", random.below(5)));
                    let at = random.below(30_000);
                    match random.below(9) {
                        0 => drop(files.rename(&name, &path("f0"))),
                        1 => drop(files.remove_file(&name)),
                        2 => drop(files.sync_dir(Path::new("/"))),
                        3 => drop(files.sync_all(Path::new("/"))),
                        kind => {
                            let Ok(file) = files.open(&name, RW) else { continue };
                            match kind {
                                4 => drop(file.set_len(at)),
                                5 => drop(disk.fdatasync(&file).await),
                                6 => drop(disk.read_at(&file, at, 5000).await),
                                _ => {
                                    let bytes =
                                        Bytes::from(vec![at as u8 | 1; random.below(20_000) as usize]);
                                    drop(disk.write_vectored_at(&file, vec![bytes], at).await);
                                }
                            }
                        }
                    }
                    // The loop must not spin when the machine is down.
                    tokio::task::yield_now().await;
                }
            };
            tokio::select! {
                biased;
                () = machine.down() => {}
                () = work => {}
            }
        });
        assert_eq!(machine.restart(), crash);
    }
    assert!(!machine.log().is_empty());
    counters.add(&machine.counters());
    machine.trace()
}

#[test]
fn the_same_seed_is_the_same_run_and_every_fault_comes_up() {
    let mut counters = Counters::default();
    let mut traces = BTreeSet::new();
    for seed in 0..15 {
        let trace = busy(seed, &mut counters);
        assert_eq!(trace, busy(seed, &mut counters), "seed {seed}");
        traces.insert(trace);
    }
    assert_eq!(traces.len(), 15);
    let everything = Rates {
        sync_fails: 1,
        sync_stalls: 1,
        write_fails: 1,
        read_fails: 1,
        no_space: 1,
        bit_flips: 1,
        stray_writes: 1,
        torn: 1,
        zero: 1,
        garbage: 1,
        ruins: 1,
        evicted: 1,
    };
    assert_eq!(counters.missing(&everything), Vec::new(), "{counters}");
    assert_eq!(Counters::default().missing(&everything), Fault::ALL);
    assert!(!Counters::default().missing(&Rates::default()).contains(&Fault::SyncFails));
}
