//! One suite, run against both drivers: they must not be told apart.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;

use crate::{
    AlignedBuf, Disk, DiskKind, File, Mode, OpKind, free_bytes, lock_file, sync_dir, sync_filesystem,
};

const KINDS: [DiskKind; 2] = [DiskKind::Uring, DiskKind::Sync];

/// Runs `test` on every driver. A host without io_uring runs the twin only and says so.
fn each<F: Future<Output = ()>>(test: impl Fn(Disk, tempfile::TempDir) -> F) {
    for kind in KINDS {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let local = tokio::task::LocalSet::new();
        local.block_on(&runtime, async {
            match Disk::open(kind) {
                Ok(disk) => test(disk, tempfile::tempdir().unwrap()).await,
                Err(error) => eprintln!("skipped: {error}"),
            }
        });
    }
}

fn open(path: &Path, direct: bool) -> File {
    File::open(path, Mode { write: true, create: true, direct, dsync: direct }).unwrap()
}

#[test]
fn writes_come_back() {
    each(|disk, dir| async move {
        for direct in [false, true] {
            let file = open(&dir.path().join(format!("a{direct}")), direct);
            let mut buf = AlignedBuf::zeroed(16384);
            for (at, byte) in buf.iter_mut().enumerate() {
                *byte = (at / 7) as u8;
            }
            let copy = buf.to_vec();
            let (buf, result) = disk.write_at(&file, buf, 16384, 4096).await;
            result.unwrap();
            assert_eq!(&buf[..], &copy[..]);
            disk.fdatasync(&file).await.unwrap();
            let plain = open(file.path(), false);
            let back = disk.read_at(&plain, 4096, 16384).await.unwrap();
            assert_eq!(&back[..], &copy[..]);
            let hole = disk.read_at(&plain, 0, 4096).await.unwrap();
            assert!(hole.len() == 4096 && hole.iter().all(|byte| *byte == 0));
        }
    });
}

#[test]
fn reads_are_short_at_the_end_only() {
    each(|disk, dir| async move {
        let file = open(&dir.path().join("a"), false);
        disk.write_vectored_at(&file, vec![Bytes::from(vec![3; 10_000])], 0).await.unwrap();
        assert_eq!(disk.read_at(&file, 0, 10_000).await.unwrap().len(), 10_000);
        assert_eq!(disk.read_at(&file, 9_990, 100).await.unwrap().len(), 10);
        assert_eq!(disk.read_at(&file, 10_000, 100).await.unwrap().len(), 0);
        assert_eq!(disk.read_at(&file, 1 << 40, 100).await.unwrap().len(), 0);
        assert_eq!(disk.read_at(&file, 0, 0).await.unwrap().len(), 0);
    });
}

#[test]
fn vectored_writes_of_many_sizes() {
    each(|disk, dir| async move {
        let file = open(&dir.path().join("a"), false);
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
    each(|disk, dir| async move {
        let path = dir.path().join("a");
        let file = open(&path, false);
        let read_only = File::open(&path, Mode::default()).unwrap();
        let (_, result) = disk.write_at(&read_only, AlignedBuf::zeroed(4096), 4096, 0).await;
        assert_eq!(result.unwrap_err().raw_os_error(), Some(9)); // EBADF
        assert!(disk.write_vectored_at(&read_only, vec![Bytes::from_static(b"x")], 0).await.is_err());
        disk.write_vectored_at(&file, vec![Bytes::from_static(b"x")], 0).await.unwrap();
        let directory = File::open(dir.path(), Mode::default()).unwrap();
        assert!(disk.read_at(&directory, 0, 10).await.is_err());
        assert_eq!(&disk.read_at(&read_only, 0, 10).await.unwrap()[..], b"x");
    });
}

#[test]
fn a_full_disk_is_an_error_with_its_name() {
    // /dev/full refuses every write with ENOSPC.
    each(|disk, _dir| async move {
        let Ok(file) = File::open(Path::new("/dev/full"), Mode { write: true, ..Mode::default() }) else {
            return;
        };
        let error = disk.write_vectored_at(&file, vec![Bytes::from_static(b"x")], 0).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    });
}

#[test]
fn many_at_once() {
    each(|disk, dir| async move {
        let file = open(&dir.path().join("a"), true);
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
        let plain = open(file.path(), false);
        let back = disk.read_at(&plain, 0, 4096 * 600).await.unwrap();
        assert!(back.chunks(4096).enumerate().all(|(k, block)| block.iter().all(|byte| *byte == k as u8)));
    });
}

#[test]
fn a_dropped_future_frees_nothing_in_use() {
    each(|disk, dir| async move {
        let file = open(&dir.path().join("a"), true);
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
        let plain = open(file.path(), false);
        let back = disk.read_at(&plain, 0, 65536).await.unwrap();
        assert!(back.iter().all(|byte| *byte != 0xee));
    });
}

#[test]
fn dropping_the_disk_waits_for_what_is_in_flight() {
    each(|disk, dir| async move {
        let file = open(&dir.path().join("a"), true);
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
    each(|disk, dir| async move {
        let left = Rc::new(Cell::new(1));
        let count = Rc::clone(&left);
        let disk = disk.with_faults(Rc::new(move |op| {
            if op.kind != OpKind::Write || count.get() > 0 {
                count.set(count.get() - i32::from(op.kind == OpKind::Write));
                return None;
            }
            Some(io::Error::from_raw_os_error(28))
        }));
        let file = open(&dir.path().join("a"), false);
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
fn locks_lengths_and_space() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("LOCK");
    let held = lock_file(&path).unwrap().expect("free");
    assert!(lock_file(&path).unwrap().is_none());
    drop(held);
    assert!(lock_file(&path).unwrap().is_some());
    assert!(free_bytes(dir.path()).unwrap() > 0);
    sync_dir(dir.path()).unwrap();
    sync_filesystem(dir.path()).unwrap();
    let file = open(&dir.path().join("wal"), true);
    assert_eq!(file.written_until().unwrap(), 0);
    file.allocate(1 << 20).unwrap();
    assert_eq!(file.len().unwrap(), 1 << 20);
    let buf = AlignedBuf::zeroed(8192);
    file.write_all_at(&buf, 0).unwrap();
    let until = file.written_until().unwrap();
    assert!(until >= 8192, "{until}");
    file.set_len(0).unwrap();
    assert!(file.is_empty().unwrap());
}
