//! The twin without io_uring: each operation is one closure on tokio's blocking pool. The closure owns buffer and file,
//! so a dropped future frees nothing that is in use.

use std::io;

use bytes::Bytes;

use crate::{AlignedBuf, File};

/// Small buffers are joined up to this size before they are written, instead of one system call each.
const JOIN_BYTES: usize = 256 * 1024;

pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)
}

pub async fn write_at(file: &File, buf: AlignedBuf, len: usize, at: u64) -> (AlignedBuf, io::Result<()>) {
    let file = file.clone();
    let done = run(move || {
        let result = file.write_all_at(&buf[..len], at);
        (buf, result)
    })
    .await;
    match done {
        Ok(done) => done,
        // The pool is gone (runtime shutting down), and the buffer with it.
        Err(error) => (AlignedBuf::zeroed(len), Err(error)),
    }
}

pub async fn write_vectored_at(file: &File, bufs: Vec<Bytes>, mut at: u64) -> io::Result<()> {
    let file = file.clone();
    run(move || {
        let mut joined = Vec::new();
        for buf in &bufs {
            if joined.len() + buf.len() > JOIN_BYTES && !joined.is_empty() {
                file.write_all_at(&joined, at)?;
                at += joined.len() as u64;
                joined.clear();
            }
            if buf.len() >= JOIN_BYTES {
                file.write_all_at(buf, at)?;
                at += buf.len() as u64;
            } else {
                joined.extend_from_slice(buf);
            }
        }
        if joined.is_empty() { Ok(()) } else { file.write_all_at(&joined, at) }
    })
    .await?
}

pub async fn read_at(file: &File, at: u64, len: usize) -> io::Result<Bytes> {
    let file = file.clone();
    run(move || {
        let mut buf = vec![0; len];
        let got = file.read_full_at(&mut buf, at)?;
        buf.truncate(got);
        Ok(buf.into())
    })
    .await?
}

/// Reads whole blocks into the front of `buf`; returns how much there was.
pub async fn read_aligned(
    file: &File,
    mut buf: AlignedBuf,
    len: usize,
    at: u64,
) -> (AlignedBuf, io::Result<usize>) {
    let file = file.clone();
    let done = run(move || {
        let result = file.read_full_at(&mut buf[..len], at);
        (buf, result)
    })
    .await;
    match done {
        Ok(done) => done,
        Err(error) => (AlignedBuf::zeroed(len), Err(error)),
    }
}

pub async fn fdatasync(file: &File) -> io::Result<()> {
    let file = file.clone();
    run(move || file.sync_data()).await?
}
