//! The io_uring driver of one shard thread.
//!
//! The one ownership rule: what the kernel may touch (buffer, iovec list, file) sits in a slab slot from submission to
//! completion, whatever happens to the future. The future only holds the slot's key. Dropping the ring waits until the
//! kernel is done with every slot.
//!
//! The ring is SINGLE_ISSUER with DEFER_TASKRUN: completions are produced only by an `io_uring_enter` with GETEVENTS
//! from this thread. An eventfd wakes the thread for that; polling the ring's own descriptor is not enough with deferred
//! task work. Older kernels get a plain ring, for which the same loop works.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use io_uring::{IoUring, opcode, squeue, types};
use slab::Slab;
use tokio::io::unix::AsyncFd;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{AlignedBuf, File};

/// Operations in flight per shard; more wait. Half of the completion queue, which is twice this.
const RING_ENTRIES: u32 = 256;

/// The kernel takes at most 1024 segments per call.
const IOV_MAX: usize = 1024;

const ENTER_GETEVENTS: u32 = 1;

/// What the kernel may be using.
enum Keep {
    Write(AlignedBuf),
    Vectored { bufs: Vec<Bytes>, iov: Vec<libc::iovec> },
    Read(Vec<u8>),
    ReadAligned(AlignedBuf),
    Nothing,
}

struct Slot {
    keep: Keep,
    _file: Option<File>,
    _permit: Option<OwnedSemaphorePermit>,
    waker: Option<Waker>,
    result: Option<i32>,
    /// Nobody waits any more; the slot goes with its completion.
    orphan: bool,
}

struct Core {
    ring: IoUring,
    slots: Slab<Slot>,
    /// Submitted or queued, and not completed.
    in_flight: usize,
}

pub struct Ring {
    /// Inside `ManuallyDrop` so that slots can be leaked should the kernel refuse to finish them.
    core: ManuallyDrop<RefCell<Core>>,
    event: Arc<OwnedFd>,
    permits: Arc<Semaphore>,
}

struct EventFd(Arc<OwnedFd>);

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

fn read_event(fd: &OwnedFd) {
    let mut count = 0u64;
    // SAFETY: eight writable bytes, alive over the call. The descriptor is nonblocking; nothing to read is fine.
    unsafe { libc::read(fd.as_raw_fd(), (&raw mut count).cast(), 8) };
}

fn signal_event(fd: &OwnedFd) {
    let one = 1u64;
    // SAFETY: eight readable bytes, alive over the call.
    unsafe { libc::write(fd.as_raw_fd(), (&raw const one).cast(), 8) };
}

fn build_ring() -> io::Result<IoUring> {
    let deferred = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_clamp()
        .build(RING_ENTRIES);
    match deferred {
        Ok(ring) => Ok(ring),
        // Kernels before 6.1 know these flags not; a plain ring runs its completions by interrupting this thread.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_clamp().build(RING_ENTRIES)
        }
        Err(error) => Err(error),
    }
}

impl Ring {
    /// Probes by making a ring and sending one operation through it.
    pub fn open() -> Result<Rc<Ring>, String> {
        let ring = build_ring().map_err(|error| format!("io_uring_setup: {error}"))?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(|error| format!("probe: {error}"))?;
        for (code, name) in [
            (opcode::Write::CODE, "write"),
            (opcode::Writev::CODE, "writev"),
            (opcode::Read::CODE, "read"),
            (opcode::Fsync::CODE, "fsync"),
        ] {
            if !probe.is_supported(code) {
                return Err(format!("this kernel has no {name} operation"));
            }
        }
        // SAFETY: no memory is passed; the result is checked before it is owned.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(format!("eventfd: {}", io::Error::last_os_error()));
        }
        // SAFETY: a fresh descriptor that nobody else owns.
        let event = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        ring.submitter()
            .register_eventfd(event.as_raw_fd())
            .map_err(|error| format!("registering an eventfd: {error}"))?;
        let this = Rc::new(Ring {
            core: ManuallyDrop::new(RefCell::new(Core { ring, slots: Slab::new(), in_flight: 0 })),
            event: Arc::clone(&event),
            permits: Arc::new(Semaphore::new(RING_ENTRIES as usize)),
        });
        let key = this.start(opcode::Nop::new().build(), Keep::Nothing, None, None);
        this.reap();
        match this.take_result(key) {
            Some((_, 0)) => {}
            Some((_, code)) => {
                return Err(format!("a probe failed: {}", io::Error::from_raw_os_error(-code)));
            }
            None => {
                this.abandon(key);
                return Err("a probe did not come back".to_owned());
            }
        }
        // SAFETY: `EventFd` owns its descriptor (shared with `Ring`), which stays open and the same until it is dropped.
        let event = unsafe { AsyncFd::register_with_interest(EventFd(event), tokio::io::Interest::READABLE) }
            .map_err(|error| format!("polling an eventfd: {error}"))?;
        tokio::task::spawn_local(drive(Rc::downgrade(&this), event));
        Ok(this)
    }

    /// Queues and submits one operation. `entry` may point only into `keep`.
    fn start(
        &self,
        entry: squeue::Entry,
        keep: Keep,
        file: Option<&File>,
        permit: Option<OwnedSemaphorePermit>,
    ) -> usize {
        let mut core = self.core.borrow_mut();
        let key = core.slots.insert(Slot {
            keep,
            _file: file.cloned(),
            _permit: permit,
            waker: None,
            result: None,
            orphan: false,
        });
        core.in_flight += 1;
        let entry = entry.user_data(key as u64);
        loop {
            // SAFETY: the entry points into the slot's `keep` (heap or mapping, whose address does not change when the
            // slab grows) and names the slot's file; both stay until the completion of `key` is reaped.
            if unsafe { core.ring.submission().push(&entry) }.is_ok() {
                break;
            }
            // Full only if earlier submissions were refused; completions make room.
            let _ = core.ring.submit_and_wait(1);
            core.collect();
        }
        if let Err(error) = core.ring.submit() {
            // Interrupted or short of resources: the entry stays queued, and the driver task submits it again.
            tracing::debug!(%error, "io_uring submission deferred");
            signal_event(&self.event);
        }
        core.collect();
        key
    }

    /// Runs deferred work and takes completions.
    fn reap(&self) {
        let mut core = self.core.borrow_mut();
        let queued = core.ring.submission().len() as u32;
        // SAFETY: no argument is passed; queued entries obey the rule in `start`.
        let entered =
            unsafe { core.ring.submitter().enter::<libc::sigset_t>(queued, 0, ENTER_GETEVENTS, None) };
        if entered.is_err() && queued > 0 {
            signal_event(&self.event);
        }
        core.collect();
    }

    fn take_result(&self, key: usize) -> Option<(Keep, i32)> {
        let mut core = self.core.borrow_mut();
        let result = core.slots.get(key)?.result?;
        Some((core.slots.remove(key).keep, result))
    }

    /// The waiter is gone. Frees the slot now or with its completion.
    fn abandon(&self, key: usize) {
        let mut core = self.core.borrow_mut();
        if let Some(slot) = core.slots.get_mut(key) {
            if slot.result.is_some() {
                core.slots.remove(key);
            } else {
                slot.orphan = true;
                slot.waker = None;
            }
        }
    }

    async fn run(
        self: &Rc<Self>,
        file: &File,
        build: impl FnOnce(&mut Keep) -> squeue::Entry,
        mut keep: Keep,
    ) -> (Keep, i32) {
        let permit = Arc::clone(&self.permits).acquire_owned().await.expect("the semaphore is never closed");
        let entry = build(&mut keep);
        let key = self.start(entry, keep, Some(file), Some(permit));
        Wait { ring: Rc::clone(self), key: Some(key) }.await
    }

    pub async fn write_at(
        self: &Rc<Self>,
        file: &File,
        mut buf: AlignedBuf,
        len: usize,
        at: u64,
    ) -> (AlignedBuf, io::Result<()>) {
        let mut done = 0;
        while done < len {
            let fd = types::Fd(file.fd());
            let build = |keep: &mut Keep| {
                let Keep::Write(buf) = keep else { unreachable!("built from a write below") };
                let part = &buf[done..len];
                // A length beyond u32 goes out in parts.
                let part_len = part.len().min(1 << 30) as u32;
                opcode::Write::new(fd, part.as_ptr(), part_len).offset(at + done as u64).build()
            };
            let (keep, code) = self.run(file, build, Keep::Write(buf)).await;
            let Keep::Write(back) = keep else { unreachable!("a slot keeps what it was given") };
            buf = back;
            match outcome(code) {
                Ok(0) => return (buf, Err(io::ErrorKind::WriteZero.into())),
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (buf, Err(error)),
            }
        }
        (buf, Ok(()))
    }

    pub async fn write_vectored_at(
        self: &Rc<Self>,
        file: &File,
        mut bufs: Vec<Bytes>,
        mut at: u64,
    ) -> io::Result<()> {
        bufs.retain(|buf| !buf.is_empty());
        // Taken from the back, in chunks that one call may carry.
        bufs.reverse();
        while !bufs.is_empty() {
            let mut chunk = bufs.split_off(bufs.len().saturating_sub(IOV_MAX));
            chunk.reverse();
            let iov = chunk
                .iter()
                .map(|buf| libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() })
                .collect();
            let fd = types::Fd(file.fd());
            let build = |keep: &mut Keep| {
                let Keep::Vectored { iov, .. } = keep else { unreachable!("built from a write below") };
                opcode::Writev::new(fd, iov.as_ptr(), iov.len() as u32).offset(at).build()
            };
            let (keep, code) = self.run(file, build, Keep::Vectored { bufs: chunk, iov }).await;
            let Keep::Vectored { bufs: mut chunk, .. } = keep else {
                unreachable!("a slot keeps what it was given")
            };
            let mut written = match outcome(code) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            at += written as u64;
            chunk.retain_mut(|buf| {
                let taken = written.min(buf.len());
                written -= taken;
                *buf = buf.slice(taken..);
                !buf.is_empty()
            });
            bufs.extend(chunk.into_iter().rev());
        }
        Ok(())
    }

    pub async fn read_at(self: &Rc<Self>, file: &File, at: u64, len: usize) -> io::Result<Bytes> {
        let mut buf: Vec<u8> = Vec::with_capacity(len);
        while buf.len() < len {
            let fd = types::Fd(file.fd());
            let from = at + buf.len() as u64;
            let build = |keep: &mut Keep| {
                let Keep::Read(buf) = keep else { unreachable!("built from a read below") };
                let want = (len - buf.len()).min(1 << 30) as u32;
                let spare = buf.spare_capacity_mut();
                opcode::Read::new(fd, spare.as_mut_ptr().cast(), want).offset(from).build()
            };
            let (keep, code) = self.run(file, build, Keep::Read(buf)).await;
            let Keep::Read(mut back) = keep else { unreachable!("a slot keeps what it was given") };
            match outcome(code) {
                Ok(0) => return Ok(back.into()),
                Ok(n) => {
                    let filled = back.len() + n;
                    assert!(filled <= back.capacity(), "the kernel read more than it was given room for");
                    // SAFETY: the kernel has initialised `n` bytes behind the old length, within the capacity.
                    unsafe { back.set_len(filled) };
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            buf = back;
        }
        Ok(buf.into())
    }

    /// Reads whole blocks into the front of `buf`; returns how much there was.
    pub async fn read_aligned(
        self: &Rc<Self>,
        file: &File,
        mut buf: AlignedBuf,
        len: usize,
        at: u64,
    ) -> (AlignedBuf, io::Result<usize>) {
        let mut done = 0;
        while done < len {
            let fd = types::Fd(file.fd());
            let build = |keep: &mut Keep| {
                let Keep::ReadAligned(buf) = keep else { unreachable!("built from a read below") };
                let part = &mut buf[done..len];
                let part_len = part.len().min(1 << 30) as u32;
                opcode::Read::new(fd, part.as_mut_ptr(), part_len).offset(at + done as u64).build()
            };
            let (keep, code) = self.run(file, build, Keep::ReadAligned(buf)).await;
            let Keep::ReadAligned(back) = keep else { unreachable!("a slot keeps what it was given") };
            buf = back;
            match outcome(code) {
                Ok(n) => {
                    done += n;
                    // A read that ends within a block has reached the end of the file.
                    if n == 0 || done % crate::BLOCK_BYTES != 0 {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (buf, Err(error)),
            }
        }
        (buf, Ok(done))
    }

    pub async fn fdatasync(self: &Rc<Self>, file: &File) -> io::Result<()> {
        loop {
            let fd = types::Fd(file.fd());
            let build = |_: &mut Keep| opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
            let (_, code) = self.run(file, build, Keep::Nothing).await;
            match outcome(code) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn outcome(code: i32) -> io::Result<usize> {
    usize::try_from(code).map_err(|_| io::Error::from_raw_os_error(-code))
}

impl Core {
    fn collect(&mut self) {
        let Core { ring, slots, in_flight } = self;
        for completion in ring.completion() {
            let key = completion.user_data() as usize;
            *in_flight -= 1;
            let Some(slot) = slots.get_mut(key) else { continue };
            slot._permit = None;
            if slot.orphan {
                slots.remove(key);
                continue;
            }
            slot.result = Some(completion.result());
            if let Some(waker) = slot.waker.take() {
                waker.wake();
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let core = self.core.get_mut();
        let mut refused = 0;
        while core.in_flight > 0 && refused < 1000 {
            if core.ring.submit_and_wait(1).is_err() {
                refused += 1;
                std::thread::yield_now();
            }
            core.collect();
        }
        if core.in_flight == 0 {
            // SAFETY: dropped once, here, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.core) };
        } else {
            // Leaking is the safe answer: the kernel may still write into these buffers.
            tracing::error!(
                in_flight = core.in_flight,
                "io_uring operations did not finish; their memory is leaked"
            );
        }
        // Ends the driver task.
        signal_event(&self.event);
    }
}

async fn drive(ring: Weak<Ring>, event: AsyncFd<EventFd>) {
    loop {
        let Ok(mut ready) = event.readable().await else { return };
        read_event(&event.get_ref().0);
        ready.clear_ready();
        drop(ready);
        // A strong reference only between waits, so that the ring can go.
        let Some(ring) = ring.upgrade() else { return };
        ring.reap();
    }
}

struct Wait {
    ring: Rc<Ring>,
    key: Option<usize>,
}

impl Future for Wait {
    type Output = (Keep, i32);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("polled again after it was ready");
        if let Some(done) = self.ring.take_result(key) {
            self.key = None;
            return Poll::Ready(done);
        }
        let mut core = self.ring.core.borrow_mut();
        let slot = core.slots.get_mut(key).expect("a slot stays until its result is taken");
        match &mut slot.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            self.ring.abandon(key);
        }
    }
}
