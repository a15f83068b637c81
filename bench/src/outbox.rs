//! Bytes waiting for a socket: small frames are built in place, large record payloads are shared, and both leave in
//! one vectored write. Belongs to one connection's task.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;

/// Slices per system call; Linux takes 1,024, and beyond some dozens nothing is gained.
const SLICES_MAX: usize = 64;
/// Payloads below this are cheaper to copy than to carry as a slice of their own.
const COPY_BYTES_MAX: usize = 8 << 10;
const SCRATCH_BYTES: usize = 256 << 10;

#[derive(Default)]
pub struct Outbox {
    queue: VecDeque<Bytes>,
    pub scratch: BytesMut,
}

impl Outbox {
    pub fn payload(&mut self, bytes: &Bytes) {
        if bytes.len() <= COPY_BYTES_MAX {
            self.scratch.extend_from_slice(bytes);
        } else {
            self.seal();
            self.queue.push_back(bytes.clone());
        }
    }

    /// Moves what was built in `scratch` to the queue.
    pub fn seal(&mut self) {
        if !self.scratch.is_empty() {
            self.queue.push_back(self.scratch.split().freeze());
            if self.scratch.capacity() < SCRATCH_BYTES / 16 {
                self.scratch.reserve(SCRATCH_BYTES);
            }
        }
    }

    /// Writes as much as the socket takes; ready when everything is out.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>, stream: &mut TcpStream) -> Poll<std::io::Result<()>> {
        self.seal();
        while !self.queue.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let mut n = 0;
            for (slot, bytes) in slices.iter_mut().zip(&self.queue) {
                *slot = IoSlice::new(bytes);
                n += 1;
            }
            let written = match Pin::new(&mut *stream).poll_write_vectored(cx, &slices[..n]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(written)) => written,
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Pending => return Poll::Pending,
            };
            self.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(front) = self.queue.front_mut() {
            if written < front.len() {
                bytes::Buf::advance(front, written);
                return;
            }
            written -= front.len();
            self.queue.pop_front();
        }
    }
}
