//! An open file of a simulated disk.

use std::io;

use bytes::Bytes;

use super::Simulated;
use super::tree::{NodeId, errno};
use crate::{AlignedBuf, Mode};

#[derive(Debug)]
pub(crate) struct Handle {
    sim: Simulated,
    node: NodeId,
    mode: Mode,
    locked: bool,
}

impl Handle {
    pub fn new(sim: Simulated, node: NodeId, mode: Mode) -> Self {
        Self { sim, node, mode, locked: false }
    }

    pub fn node(&self) -> NodeId {
        self.node
    }

    pub fn holds_lock(&mut self) {
        self.locked = true;
    }

    pub fn is_direct(&self) -> bool {
        self.mode.direct
    }

    fn writable(&self) -> io::Result<()> {
        if self.mode.write { Ok(()) } else { Err(errno(libc::EBADF)) }
    }

    pub fn len(&self) -> io::Result<u64> {
        self.sim.len(self.node)
    }

    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.writable()?;
        self.sim.set_len(self.node, len)
    }

    pub fn sync(&self) -> io::Result<()> {
        self.sim.sync(self.node)
    }

    pub fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.writable()?;
        self.sim.write(self.node, at, bytes, self.mode)
    }

    pub fn read_at(&self, out: &mut [u8], at: u64) -> io::Result<usize> {
        self.sim.read(self.node, at, out)
    }

    pub fn allocate(&self, len: u64) -> io::Result<()> {
        self.writable()?;
        self.sim.allocate(self.node, len)
    }

    pub fn written_until(&self) -> io::Result<u64> {
        self.sim.written_until(self.node)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.locked {
            self.sim.unlock(self.node);
        }
    }
}

/// The driver's side: what `Disk` does to a file. A call on a machine that is down never comes back.
impl Simulated {
    /// Errors of a dead machine are nobody's to see.
    async fn alive<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.unless_down().await;
        }
        result
    }

    pub async fn disk_write(
        &self,
        handle: &Handle,
        buf: AlignedBuf,
        len: usize,
        at: u64,
    ) -> (AlignedBuf, io::Result<()>) {
        let bytes = buf[..len].to_vec();
        (buf, self.disk_write_bytes(handle, bytes, at).await)
    }

    pub async fn disk_write_bytes(&self, handle: &Handle, bytes: Vec<u8>, at: u64) -> io::Result<()> {
        self.alive(handle.writable()).await?;
        let result = self.write_later(handle.node, at, bytes, handle.mode).await;
        self.alive(result).await
    }

    pub async fn disk_read(&self, handle: &Handle, at: u64, len: usize) -> io::Result<Bytes> {
        self.wait().await;
        // A reader may ask for more than there is; only what there is takes memory.
        let there = self.len(handle.node).map(|end| end.saturating_sub(at));
        let there = self.alive(there).await?;
        let mut bytes = vec![0; len.min(usize::try_from(there).unwrap_or(usize::MAX))];
        let got = self.alive(self.read(handle.node, at, &mut bytes)).await?;
        bytes.truncate(got);
        Ok(bytes.into())
    }

    pub async fn disk_read_aligned(
        &self,
        handle: &Handle,
        mut buf: AlignedBuf,
        len: usize,
        at: u64,
    ) -> (AlignedBuf, io::Result<usize>) {
        self.wait().await;
        let got = self.alive(self.read(handle.node, at, &mut buf[..len])).await;
        (buf, got)
    }

    pub async fn disk_sync(&self, handle: &Handle) -> io::Result<()> {
        let result = self.sync_later(handle.node).await;
        self.alive(result).await
    }
}
