//! One client connection: frames in, answers out, in the order of the requests.
//!
//! Two tasks on the shard of the connection share it. The reader cuts frames and starts requests; a
//! produce is only started (its answer comes when the log has it), everything else is finished before
//! the next frame is looked at, as Kafka does. The writer sends answers in request order and gathers
//! those that are ready into one system call.
//!
//! Bounds: `PIPELINE_MAX` requests of one connection may be unanswered; beyond that the reader stops
//! reading, and the client's TCP window closes. A partial frame costs what has arrived of it. A connection without a
//! request for `connections.max.idle.ms` is closed: a client that vanished without a word leaves nothing behind.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::ready;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use flumen_protocol::frame::{FrameAssembler, REQUEST_BYTES_MAX};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::dispatch::{self, Answer};
use crate::shard::Shard;

/// Unanswered requests of one connection. Clients keep 5 in flight, some tools a few dozen.
const PIPELINE_MAX: usize = 128;
/// A frame that misses more than this is read straight into its own buffer.
const DIRECT_READ_BYTES: usize = 32 << 10;
/// Slices handed to the kernel in one call (IOV_MAX is 1024 on Linux; fewer keep the stack small).
const WRITE_SLICES_MAX: usize = 256;
/// Answers gathered before they are written, in bytes: more would only delay the first of them.
const WRITE_BATCH_BYTES: usize = 1 << 20;

struct Shared {
    answers: RefCell<VecDeque<Answer>>,
    answer_added: Notify,
    answer_sent: Notify,
    /// Wakes a reader that waits for bytes.
    closing: Notify,
    closed: Cell<bool>,
    reader_done: Cell<bool>,
    /// When bytes last came or went.
    last_active: Cell<Instant>,
    /// A request is being served: a long poll is silence, but not idleness.
    serving: Cell<bool>,
}

impl Shared {
    /// Returns when the connection has been idle for `max_idle`. Looks at the clock once per period, not per request.
    async fn idle(&self, max_idle: Duration) {
        loop {
            let seen = self.last_active.get();
            tokio::time::sleep_until(seen + max_idle).await;
            if self.serving.get() || !self.answers.borrow().is_empty() {
                self.last_active.set(Instant::now());
            } else if self.last_active.get() == seen {
                return;
            }
        }
    }

    fn close(&self) {
        self.closed.set(true);
        self.answer_added.notify_one();
        self.answer_sent.notify_one();
        self.closing.notify_one();
    }
}

/// Who is asking; handlers put it into group membership and log lines.
pub struct Peer {
    pub address: SocketAddr,
    /// Another broker passed the request on; it is not passed on again.
    pub forwarded: bool,
}

pub fn start(shard: &Rc<Shard>, stream: std::net::TcpStream, address: SocketAddr) {
    let stream = match TcpStream::from_std(stream) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(%address, %error, "connection lost before it was served");
            shard.node.shards[shard.id].connection_closed();
            return;
        }
    };
    let (mut reads, writes) = stream.into_split();
    let shared = Rc::new(Shared {
        answers: RefCell::default(),
        answer_added: Notify::new(),
        answer_sent: Notify::new(),
        closing: Notify::new(),
        closed: Cell::new(false),
        reader_done: Cell::new(false),
        last_active: Cell::new(Instant::now()),
        serving: Cell::new(false),
    });
    let writer = shared.clone();
    tokio::task::spawn_local(async move {
        if let Err(error) = write_answers(&writer, &writes).await {
            tracing::debug!(%address, %error, "connection closed while answering");
        }
        writer.close();
    });
    let shard = shard.clone();
    tokio::task::spawn_local(async move {
        let peer = Peer { address, forwarded: false };
        tokio::select! {
            outcome = read_requests(&shard, &shared, &mut reads, &peer) => match outcome {
                Ok(()) => {}
                Err(error) => tracing::debug!(%address, %error, "connection closed"),
            },
            () = shard.stop.notified() => {}
            // The writer gave up: the reader must not hold the socket open.
            () = shared.closing.notified() => {}
            () = async {
                match shard.node.config.connections_max_idle() {
                    Some(max_idle) => shared.idle(max_idle).await,
                    None => std::future::pending().await,
                }
            } => tracing::debug!(%address, "idle connection closed"),
        }
        // Answers to requests already taken are still sent.
        shared.reader_done.set(true);
        shared.answer_added.notify_one();
        shard.node.shards[shard.id].connection_closed();
    });
}

async fn read_requests(
    shard: &Rc<Shard>,
    shared: &Rc<Shared>,
    reads: &mut OwnedReadHalf,
    peer: &Peer,
) -> io::Result<()> {
    let mut assembler = FrameAssembler::new(REQUEST_BYTES_MAX);
    let mut frames: Vec<BytesMut> = Vec::new();
    while !shared.closed.get() {
        if read_some(shard, reads, &mut assembler, &mut frames).await? == 0 {
            return Ok(());
        }
        shared.last_active.set(Instant::now());
        for frame in frames.drain(..) {
            while shared.answers.borrow().len() >= PIPELINE_MAX && !shared.closed.get() {
                shared.answer_sent.notified().await;
            }
            shared.serving.set(true);
            let answer = dispatch::handle(shard, peer, frame).await.map_err(io::Error::other)?;
            shared.serving.set(false);
            if !matches!(answer, Answer::None) {
                shared.answers.borrow_mut().push_back(answer);
                shared.answer_added.notify_one();
            }
        }
    }
    Ok(())
}

/// One read from the socket. It goes through `poll_read`, which takes a read that did not fill its buffer for the end of
/// what is there and saves the call that would only say so.
async fn read_some(
    shard: &Shard,
    reads: &mut OwnedReadHalf,
    assembler: &mut FrameAssembler,
    frames: &mut Vec<BytesMut>,
) -> io::Result<usize> {
    if let Some((buffer, missing)) = assembler.partial_mut()
        && missing > DIRECT_READ_BYTES
    {
        // The buffer's spare room is bounded by what has arrived so far; never read past the frame.
        let mut limited = bytes::BufMut::limit(buffer, missing);
        let read = reads.read_buf(&mut limited).await?;
        frames.extend(assembler.take_complete());
        return Ok(read);
    }
    std::future::poll_fn(|context| {
        // Borrowed for this poll only: the scratch belongs to every connection of the shard.
        let mut scratch = shard.scratch.borrow_mut();
        let mut buffer = ReadBuf::new(&mut scratch);
        ready!(Pin::new(&mut *reads).poll_read(context, &mut buffer))?;
        assembler.push(buffer.filled(), frames).map_err(io::Error::other)?;
        io::Result::Ok(buffer.filled().len()).into()
    })
    .await
}

async fn write_answers(shared: &Shared, writes: &OwnedWriteHalf) -> io::Result<()> {
    let mut batch: VecDeque<Bytes> = VecDeque::new();
    loop {
        let next = shared.answers.borrow_mut().pop_front();
        match next {
            Some(Answer::Ready(segments)) => batch.extend(segments),
            Some(Answer::Waiting(mut waiting)) => {
                // What is ready goes out before we wait for something that is not.
                if !batch.is_empty() && !waiting.is_ready() {
                    write_all(writes, &mut batch).await?;
                }
                match waiting.finish().await {
                    Some(segments) => batch.extend(segments),
                    None => return Ok(()),
                }
            }
            Some(Answer::None) => {}
            None => {
                if !batch.is_empty() {
                    write_all(writes, &mut batch).await?;
                    continue;
                }
                if shared.reader_done.get() || shared.closed.get() {
                    return Ok(());
                }
                shared.answer_added.notified().await;
                continue;
            }
        }
        shared.answer_sent.notify_one();
        shared.last_active.set(Instant::now());
        if batch.iter().map(Bytes::len).sum::<usize>() >= WRITE_BATCH_BYTES || batch.len() >= WRITE_SLICES_MAX
        {
            write_all(writes, &mut batch).await?;
        }
    }
}

async fn write_all(stream: &OwnedWriteHalf, batch: &mut VecDeque<Bytes>) -> io::Result<()> {
    loop {
        match write_ready(stream, batch) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(e) => return Err(e),
        }
    }
}

/// Writes what the socket takes now; fails with `WouldBlock` when something is left.
pub(crate) fn write_ready(stream: &OwnedWriteHalf, batch: &mut VecDeque<Bytes>) -> io::Result<()> {
    while let Some(front) = batch.front() {
        if front.is_empty() {
            batch.pop_front();
            continue;
        }
        let mut slices = [IoSlice::new(&[]); WRITE_SLICES_MAX];
        let mut count = 0;
        for (slot, bytes) in slices.iter_mut().zip(batch.iter()) {
            *slot = IoSlice::new(bytes);
            count += 1;
        }
        match stream.try_write_vectored(&slices[..count])? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            taken => advance(batch, taken),
        }
    }
    Ok(())
}

/// Takes from the front what was written.
pub(crate) fn advance(batch: &mut VecDeque<Bytes>, mut taken: usize) {
    while let Some(front) = batch.front_mut().filter(|_| taken > 0) {
        if taken < front.len() {
            front.advance(taken);
            return;
        }
        taken -= front.len();
        batch.pop_front();
    }
}
