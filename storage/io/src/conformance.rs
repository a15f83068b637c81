//! One suite, run against every driver and file system: they must not be told apart.

use std::cell::Cell;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bytes::Bytes;

use crate::simulated::{Machine, Settings};
use crate::{AlignedBuf, Disk, DiskKind, File, FileSystem, LastBlock, Mode, OpKind};

/// A driver, and an empty directory that it can reach.
struct Ground {
    disk: Disk,
    files: FileSystem,
    dir: PathBuf,
    kept: Kept,
}

enum Kept {
    Machine(#[allow(dead_code, reason = "removed when it is dropped")] tempfile::TempDir),
    Simulated(Machine),
}

impl Ground {
    fn all() -> Vec<Ground> {
        let mut all = Vec::new();
        for kind in [DiskKind::Uring, DiskKind::Sync] {
            match Disk::open(kind) {
                Ok(disk) => {
                    let temp = tempfile::tempdir().unwrap();
                    let dir = temp.path().to_owned();
                    all.push(Ground { disk, files: FileSystem::machine(), dir, kept: Kept::Machine(temp) });
                }
                // A host without io_uring runs the others only and says so.
                Err(error) => eprintln!("skipped: {error}"),
            }
        }
        let machine = Machine::new(7, Settings::default());
        let files = machine.file_system();
        let dir = PathBuf::from("/ground");
        files.create_dir(&dir).unwrap();
        all.push(Ground { disk: machine.disk(), files, dir, kept: Kept::Simulated(machine) });
        all
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn open(&self, name: &str, direct: bool) -> File {
        let mode = Mode { write: true, create: true, direct, dsync: direct };
        self.files.open(&self.path(name), mode).unwrap()
    }

    fn plain(&self, file: &File) -> File {
        self.files.open(file.path(), Mode { write: true, ..Mode::default() }).unwrap()
    }

    /// A file that refuses every write for want of space; `None` where the host has none.
    fn full_file(&self) -> Option<File> {
        match &self.kept {
            Kept::Machine(_) => {
                self.files.open(Path::new("/dev/full"), Mode { write: true, ..Mode::default() }).ok()
            }
            Kept::Simulated(machine) => {
                let file = self.open("full", false);
                machine.fill_up();
                Some(file)
            }
        }
    }
}

/// Runs `test` on every driver.
fn each<F: Future<Output = ()>>(test: impl Fn(Ground) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        for ground in Ground::all() {
            test(ground).await;
        }
    });
}

#[test]
fn writes_come_back() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        for direct in [false, true] {
            let file = ground.open(&format!("a{direct}"), direct);
            let mut buf = AlignedBuf::zeroed(16384);
            for (at, byte) in buf.iter_mut().enumerate() {
                *byte = (at / 7) as u8;
            }
            let copy = buf.to_vec();
            let (buf, result) = disk.write_at(&file, buf, 16384, 4096).await;
            result.unwrap();
            assert_eq!(&buf[..], &copy[..]);
            disk.fdatasync(&file).await.unwrap();
            let plain = ground.plain(&file);
            let back = disk.read_at(&plain, 4096, 16384).await.unwrap();
            assert_eq!(&back[..], &copy[..]);
            let hole = disk.read_at(&plain, 0, 4096).await.unwrap();
            assert!(hole.len() == 4096 && hole.iter().all(|byte| *byte == 0));
        }
    });
}

#[test]
fn reads_are_short_at_the_end_only() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        let file = ground.open("a", false);
        disk.write_vectored_at(&file, vec![Bytes::from(vec![3; 10_000])], 0).await.unwrap();
        assert_eq!(disk.read_at(&file, 0, 10_000).await.unwrap().len(), 10_000);
        assert_eq!(disk.read_at(&file, 9_990, 100).await.unwrap().len(), 10);
        assert_eq!(disk.read_at(&file, 10_000, 100).await.unwrap().len(), 0);
        assert_eq!(disk.read_at(&file, 1 << 40, 100).await.unwrap().len(), 0);
        assert_eq!(disk.read_at(&file, 0, 0).await.unwrap().len(), 0);
    });
}

#[test]
fn direct_reads_of_any_range() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        let bytes: Vec<u8> = (0..700_001usize).map(|at| (at / 3) as u8).collect();
        ground.open("a", false).write_all_at(&bytes, 0).unwrap();
        let mode = Mode { direct: true, ..Mode::default() };
        let file = ground.files.open(&ground.path("a"), mode).unwrap();
        for (at, len) in
            [(0, 1), (0, 4096), (1, 4095), (4095, 2), (5000, 300_000), (699_990, 100), (8192, 691_809)]
        {
            let end = (at + len).min(bytes.len());
            let back = disk.read_at(&file, at as u64, len).await.unwrap();
            assert!(back[..] == bytes[at..end], "{len} bytes at {at}");
        }
        assert!(disk.read_at(&file, 700_001, 5).await.unwrap().is_empty());
        assert!(disk.read_at(&file, 1 << 40, 5).await.unwrap().is_empty());
        assert!(disk.read_at(&file, 7, 0).await.unwrap().is_empty());
    });
}

#[test]
fn appends_of_any_length() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        for direct in [false, true] {
            let mode = Mode { write: true, create: true, direct, dsync: false };
            let file = ground.files.open(&ground.path(&format!("log{direct}")), mode).unwrap();
            file.allocate(8 << 20).unwrap();
            let mut last = LastBlock::default();
            let mut whole = Vec::new();
            for (round, len) in [10usize, 4086, 1, 4095, 70_000, 0, 2_500_000, 3].into_iter().enumerate() {
                let bufs: Vec<Bytes> = (0..len)
                    .collect::<Vec<_>>()
                    .chunks(1000)
                    .map(|part| part.iter().map(|k| (k + round) as u8).collect())
                    .collect();
                disk.append_at(&file, &mut last, &bufs, whole.len() as u64).await.unwrap();
                whole.extend(bufs.iter().flatten());
                if round % 3 == 2 {
                    // Somebody else takes over: the block is read back.
                    last = LastBlock::default();
                }
            }
            disk.fdatasync(&file).await.unwrap();
            let back = disk.read_at(&file, 0, whole.len()).await.unwrap();
            assert!(back[..] == whole[..]);
            let behind = disk.read_at(&file, whole.len() as u64, 5000).await.unwrap();
            assert!(behind.iter().all(|byte| *byte == 0));
        }
    });
}

#[test]
fn vectored_writes_of_many_sizes() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        let file = ground.open("a", false);
        let bufs: Vec<Bytes> = (0..3000usize).map(|k| Bytes::from(vec![k as u8; k % 700])).collect();
        let whole: Vec<u8> = bufs.iter().flatten().copied().collect();
        disk.write_vectored_at(&file, bufs, 5).await.unwrap();
        assert_eq!(&disk.read_at(&file, 5, whole.len() + 10).await.unwrap()[..], &whole[..]);
        disk.write_vectored_at(&file, Vec::new(), 0).await.unwrap();
        let big = vec![Bytes::from(vec![1; 3 << 20]), Bytes::from_static(b"end")];
        disk.write_vectored_at(&file, big, 0).await.unwrap();
        assert_eq!(&disk.read_at(&file, 3 << 20, 3).await.unwrap()[..], b"end");
    });
}

#[test]
fn errors_are_reported_and_the_disk_goes_on() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        let file = ground.open("a", false);
        let read_only = ground.files.open(file.path(), Mode::default()).unwrap();
        let (_, result) = disk.write_at(&read_only, AlignedBuf::zeroed(4096), 4096, 0).await;
        assert_eq!(result.unwrap_err().raw_os_error(), Some(9)); // EBADF
        assert!(disk.write_vectored_at(&read_only, vec![Bytes::from_static(b"x")], 0).await.is_err());
        disk.write_vectored_at(&file, vec![Bytes::from_static(b"x")], 0).await.unwrap();
        let directory = ground.files.open(&ground.dir, Mode::default()).unwrap();
        assert!(disk.read_at(&directory, 0, 10).await.is_err());
        assert_eq!(&disk.read_at(&read_only, 0, 10).await.unwrap()[..], b"x");
    });
}

#[test]
fn a_full_disk_is_an_error_with_its_name() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        let Some(file) = ground.full_file() else { return };
        let error = disk.write_vectored_at(&file, vec![Bytes::from_static(b"x")], 0).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    });
}

#[test]
fn many_at_once() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        let file = ground.open("a", true);
        file.allocate(4096 * 600).unwrap();
        let mut tasks = tokio::task::JoinSet::new();
        for k in 0..600u64 {
            let (disk, file) = (disk.clone(), file.clone());
            tasks.spawn_local(async move {
                let mut buf = AlignedBuf::zeroed(4096);
                buf.fill(k as u8);
                disk.write_at(&file, buf, 4096, k * 4096).await.1.unwrap();
            });
        }
        while let Some(done) = tasks.join_next().await {
            done.unwrap();
        }
        let plain = ground.plain(&file);
        let back = disk.read_at(&plain, 0, 4096 * 600).await.unwrap();
        assert!(back.chunks(4096).enumerate().all(|(k, block)| block.iter().all(|byte| *byte == k as u8)));
    });
}

#[test]
fn a_dropped_future_frees_nothing_in_use() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        let file = ground.open("a", true);
        file.allocate(1 << 20).unwrap();
        for round in 0..200u64 {
            let mut buf = AlignedBuf::zeroed(65536);
            buf.fill(round as u8);
            let write = disk.write_at(&file, buf, 65536, 0);
            // Polled once, then dropped with the write in flight or done.
            tokio::select! {
                biased;
                _ = write => {}
                () = std::future::ready(()) => {}
            }
            let read = disk.read_at(&file, 0, 4096);
            tokio::select! {
                biased;
                _ = read => {}
                () = std::future::ready(()) => {}
            }
            // Memory that would be reused had it been freed too early.
            let mut other = AlignedBuf::zeroed(65536);
            other.fill(0xee);
        }
        // Still works, and no write carried foreign bytes.
        disk.fdatasync(&file).await.unwrap();
        tokio::task::yield_now().await;
        let plain = ground.plain(&file);
        let back = disk.read_at(&plain, 0, 65536).await.unwrap();
        assert!(back.iter().all(|byte| *byte != 0xee));
    });
}

#[test]
fn dropping_the_disk_waits_for_what_is_in_flight() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        let file = ground.open("a", true);
        let mut buf = AlignedBuf::zeroed(1 << 20);
        buf.fill(9);
        {
            let write = disk.write_at(&file, buf, 1 << 20, 0);
            tokio::select! {
                biased;
                _ = write => {}
                () = std::future::ready(()) => {}
            }
        }
        drop(disk);
        tokio::task::yield_now().await;
    });
}

#[test]
fn faults_stand_in_for_the_disk() {
    each(|ground| async move {
        let disk = ground.disk.clone();
        let left = Rc::new(Cell::new(1));
        let count = Rc::clone(&left);
        let disk = disk.with_faults(Rc::new(move |op| {
            if op.kind != OpKind::Write || count.get() > 0 {
                count.set(count.get() - i32::from(op.kind == OpKind::Write));
                return None;
            }
            Some(io::Error::from_raw_os_error(28))
        }));
        let file = ground.open("a", false);
        disk.write_vectored_at(&file, vec![Bytes::from_static(b"x")], 0).await.unwrap();
        let error = disk.write_vectored_at(&file, vec![Bytes::from_static(b"y")], 0).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(&disk.read_at(&file, 0, 9).await.unwrap()[..], b"x");
        left.set(1);
        disk.write_vectored_at(&file, vec![Bytes::from_static(b"y")], 0).await.unwrap();
    });
}

#[test]
fn auto_always_opens() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        assert!(!Disk::open(DiskKind::Auto).unwrap().description().is_empty());
    });
}

#[test]
fn off_thread_work_comes_back() {
    each(|ground| async move {
        let (files, path) = (ground.files.clone(), ground.path("small"));
        let read = ground.disk.off_thread(move || {
            files.write(&path, b"content")?;
            files.read(&path)
        });
        assert_eq!(read.await.unwrap().unwrap(), b"content");
    });
}

#[test]
fn locks_lengths_and_space() {
    each(|ground| async move {
        let Ground { files, dir, .. } = &ground;
        let path = ground.path("LOCK");
        let held = files.lock(&path).unwrap().expect("free");
        assert!(files.lock(&path).unwrap().is_none());
        drop(held);
        assert!(files.lock(&path).unwrap().is_some());
        assert!(files.free_bytes(dir).unwrap() > 0);
        files.sync_dir(dir).unwrap();
        files.sync_all(dir).unwrap();
        let file = ground.open("wal", true);
        assert_eq!(file.written_until().unwrap(), 0);
        file.allocate(1 << 20).unwrap();
        assert_eq!(file.len().unwrap(), 1 << 20);
        let buf = AlignedBuf::zeroed(8192);
        file.write_all_at(&buf, 0).unwrap();
        let until = file.written_until().unwrap();
        assert!(until >= 8192, "{until}");
        file.set_len(0).unwrap();
        assert!(file.is_empty().unwrap());
        assert_eq!(files.boot_id(), files.boot_id());
        assert_ne!(files.random_id(), files.random_id());
    });
}

#[test]
fn lengths_cut_and_grow_with_zeros() {
    each(|ground| async move {
        let file = ground.open("a", false);
        file.write_all_at(&[7; 10_000], 0).unwrap();
        file.set_len(5000).unwrap();
        file.set_len(9000).unwrap();
        let mut back = vec![1; 10_000];
        assert_eq!(file.read_full_at(&mut back, 0).unwrap(), 9000);
        assert!(back[..5000].iter().all(|byte| *byte == 7) && back[5000..9000].iter().all(|byte| *byte == 0));
        file.write_all_at(&[8; 10], 20_000).unwrap();
        assert_eq!(file.len().unwrap(), 20_010);
        assert_eq!(file.read_full_at(&mut back[..100], 19_990).unwrap(), 20);
        assert!(back[..10].iter().all(|byte| *byte == 0) && back[10..20].iter().all(|byte| *byte == 8));
    });
}

#[test]
fn names() {
    each(|ground| async move {
        let Ground { files, .. } = &ground;
        let kind = |result: io::Result<()>| result.map_err(|error| error.kind());
        let a = ground.path("a");
        assert_eq!(kind(files.metadata(&a).map(drop)), Err(io::ErrorKind::NotFound));
        assert_eq!(kind(files.read(&a).map(drop)), Err(io::ErrorKind::NotFound));
        assert_eq!(kind(files.remove_file(&a)), Err(io::ErrorKind::NotFound));
        assert_eq!(kind(files.open(&a, Mode::default()).map(drop)), Err(io::ErrorKind::NotFound));
        files.write(&a, b"a long first content").unwrap();
        files.write(&a, b"one").unwrap();
        assert_eq!(files.read(&a).unwrap(), b"one");
        assert!(!files.is_dir(&a) && files.exists(&a));
        files.write(&ground.path("b"), b"two").unwrap();
        let held = files.open(&ground.path("b"), Mode::default()).unwrap();
        files.rename(&a, &ground.path("b")).unwrap();
        assert_eq!(files.read(&ground.path("b")).unwrap(), b"one");
        // Who had the replaced file open still has it.
        let mut old = [0; 3];
        held.read_full_at(&mut old, 0).unwrap();
        assert_eq!(&old, b"two");
        let dir = ground.path("d/e");
        assert_eq!(kind(files.create_dir(&dir)), Err(io::ErrorKind::NotFound));
        files.create_dir_all(&dir).unwrap();
        files.create_dir_all(&dir).unwrap();
        assert_eq!(kind(files.create_dir(&dir)), Err(io::ErrorKind::AlreadyExists));
        files.write(&dir.join("f"), b"x").unwrap();
        assert_eq!(kind(files.remove_dir(&dir)), Err(io::ErrorKind::DirectoryNotEmpty));
        assert_eq!(kind(files.remove_file(&dir)), Err(io::ErrorKind::IsADirectory));
        assert_eq!(kind(files.create_dir_all(&dir.join("f"))), kind(files.create_dir_all(&dir.join("f"))));
        assert!(files.create_dir_all(&dir.join("f")).is_err());
        assert_eq!(kind(files.list(&dir.join("f")).map(drop)), Err(io::ErrorKind::NotADirectory));
        assert_eq!(kind(files.write(&dir.join("f/g"), b"")), Err(io::ErrorKind::NotADirectory));
        assert_eq!(kind(files.rename(&dir.join("f"), &ground.path("f"))), Err(io::ErrorKind::InvalidInput));
        assert_eq!(kind(files.write(&dir, b"")), Err(io::ErrorKind::IsADirectory));
        files.rename(&ground.path("d"), &ground.path("z")).unwrap();
        files.sync_dir(&ground.dir).unwrap();
        let found: Vec<(String, bool, u64)> = files
            .list(&ground.dir)
            .unwrap()
            .into_iter()
            .map(|entry| (entry.name, entry.is_dir, if entry.is_dir { 0 } else { entry.len }))
            .collect();
        assert_eq!(found, [("b".to_owned(), false, 3), ("z".to_owned(), true, 0)]);
        assert!(files.metadata(&ground.path("b")).unwrap().modified_ms > 1_600_000_000_000);
        files.remove_dir_all(&ground.path("z")).unwrap();
        files.remove_file(&ground.path("b")).unwrap();
        assert!(files.list(&ground.dir).unwrap().is_empty());
    });
}
