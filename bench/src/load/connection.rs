//! One connection of the generator: builds requests, keeps a bounded number of them unanswered, times the answers.
//!
//! A task on the generator's thread. It stops sending at the end of the run and then only waits for what is unanswered.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Buf, BufMut, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use super::LoadConfig;
use super::figures::{Sent, Totals};
use crate::batch::Template;
use crate::client::CLIENT_ID;
use crate::outbox::Outbox;
use crate::pace::Due;
use crate::plan::Plan;
use crate::wire::{self, Reader};

/// Answers to Produce are small; a larger claim means the peer does not speak Kafka.
const ANSWER_BYTES_MAX: usize = 16 << 20;
const READ_BYTES: usize = 64 << 10;
const REQUEST_TIMEOUT_MS: i32 = 30_000;
/// How long answers are awaited after the last request before they are counted as missing.
const LAST_ANSWERS_WAIT: Duration = Duration::from_secs(60);

pub(super) struct Connection {
    id: usize,
    stream: TcpStream,
    template: Template,
    plan: Rc<Plan>,
    topic: String,
    version: i16,
    acks: i16,
    /// Next sequence of each partition; empty without idempotence.
    sequences: Vec<i32>,
    turn: u64,
    correlation_id: i32,
    in_flight: VecDeque<Sent>,
    in_flight_max: usize,
    out: Outbox,
    input: BytesMut,
}

enum Event {
    Read(usize),
    Due,
}

impl Connection {
    pub fn new(
        id: usize,
        stream: TcpStream,
        template: Template,
        plan: Rc<Plan>,
        config: &LoadConfig,
    ) -> Self {
        Self {
            id,
            stream,
            template,
            plan,
            topic: config.topic.clone(),
            version: config.produce_version,
            acks: config.acks,
            sequences: if config.idempotent { vec![0; config.partitions] } else { Vec::new() },
            turn: 0,
            correlation_id: 0,
            in_flight: VecDeque::new(),
            in_flight_max: config.in_flight,
            out: Outbox::default(),
            input: BytesMut::with_capacity(READ_BYTES),
        }
    }

    pub async fn run(
        mut self,
        due: Option<Rc<Due>>,
        end: Instant,
        totals: Rc<RefCell<Totals>>,
    ) -> Result<()> {
        let id = self.id;
        let work = self.work(due.as_deref(), end, &totals);
        let outcome = tokio::time::timeout_at((end + LAST_ANSWERS_WAIT).into(), work).await;
        match outcome {
            Ok(result) => result.with_context(|| format!("connection {id}"))?,
            Err(_) => totals.borrow_mut().unanswered += self.in_flight.len() as u64,
        }
        if let Some(due) = due {
            totals.borrow_mut().unsent += due.queue.borrow().len() as u64;
        }
        Ok(())
    }

    async fn work(&mut self, due: Option<&Due>, end: Instant, totals: &RefCell<Totals>) -> Result<()> {
        let mut now = Instant::now();
        loop {
            while self.in_flight.len() < self.in_flight_max && now < end && !totals.borrow().spent() {
                let intended = match due {
                    Some(due) => match due.queue.borrow_mut().pop_front() {
                        Some(at) => at,
                        None => break,
                    },
                    None => now,
                };
                if due.is_some() {
                    let late = now.saturating_duration_since(intended).as_micros() as u64;
                    totals.borrow_mut().late.saturating_record(late);
                }
                let batches = self.request(intended);
                if let Some(remaining) = &mut totals.borrow_mut().remaining {
                    *remaining = remaining.saturating_sub(batches);
                }
            }
            if self.in_flight.is_empty() && (now >= end || totals.borrow().spent()) {
                return Ok(());
            }
            match self.event(due, end).await? {
                Event::Due => now = Instant::now(),
                Event::Read(0) => bail!("the broker closed the connection"),
                Event::Read(_) => {
                    now = Instant::now();
                    self.answers(now, &mut totals.borrow_mut())?;
                }
            }
        }
    }

    /// Waits until bytes have come, or until there is something to send.
    async fn event(&mut self, due: Option<&Due>, end: Instant) -> Result<Event> {
        let idle_end = self.in_flight.is_empty().then_some(end);
        let stream = &mut self.stream;
        let (out, input) = (&mut self.out, &mut self.input);
        let room = self.in_flight.len() < self.in_flight_max;
        let wait = poll_fn(|cx| {
            if let Poll::Ready(Err(e)) = out.poll_flush(cx, stream) {
                return Poll::Ready(Err(e));
            }
            if let (Some(due), true) = (due, room) {
                if !due.queue.borrow().is_empty() && Instant::now() < end {
                    return Poll::Ready(Ok(Event::Due));
                }
                due.wake_with(cx.waker());
            }
            input.reserve(READ_BYTES);
            poll_read(stream, cx, input).map_ok(Event::Read)
        });
        match idle_end {
            // Nothing will come from the broker, so the end of the run must wake us.
            Some(end) => match tokio::time::timeout_at(end.into(), wait).await {
                Ok(event) => Ok(event?),
                Err(_) => Ok(Event::Due),
            },
            None => Ok(wait.await?),
        }
    }

    /// Queues the next request; returns how many batches it holds.
    fn request(&mut self, intended: Instant) -> u64 {
        let partitions = self.plan.partitions(self.id, self.turn);
        self.turn += 1;
        let out = &mut self.out;
        out.seal();
        let batch_bytes = self.template.total_bytes();
        let buf = &mut out.scratch;
        wire::start_request(buf, wire::PRODUCE, self.version, self.correlation_id, CLIENT_ID);
        self.correlation_id = self.correlation_id.wrapping_add(1);
        buf.put_u8(0);
        buf.put_i16(self.acks);
        buf.put_i32(REQUEST_TIMEOUT_MS);
        wire::put_uvarint(buf, 2);
        wire::put_compact_str(buf, &self.topic);
        wire::put_uvarint(buf, partitions.len() as u32 + 1);
        // Large payloads leave `scratch`, so the length is known by arithmetic, not by looking back.
        let head = buf.len();
        let length_bytes = uvarint_bytes(batch_bytes as u32 + 1);
        let total = head + partitions.len() * (4 + length_bytes + batch_bytes + 1) + 2;
        buf[0..4].copy_from_slice(&((total - 4) as i32).to_be_bytes());
        for &p in partitions {
            let buf = &mut out.scratch;
            buf.put_i32(p as i32);
            wire::put_uvarint(buf, batch_bytes as u32 + 1);
            let sequence = match self.sequences.get_mut(p as usize) {
                Some(next) => {
                    let sequence = *next;
                    // Sequences wrap to 0 after i32::MAX, as Kafka counts them.
                    *next =
                        ((i64::from(sequence) + i64::from(self.template.record_count)) % (1 << 31)) as i32;
                    sequence
                }
                None => -1,
            };
            buf.put_slice(&self.template.header(sequence));
            out.payload(&self.template.records);
            out.scratch.put_u8(0);
        }
        out.scratch.put_slice(&[0, 0]);
        self.in_flight.push_back(Sent {
            intended,
            batches: partitions.len() as u32,
            bytes: (partitions.len() * batch_bytes) as u64,
        });
        partitions.len() as u64
    }

    fn answers(&mut self, now: Instant, totals: &mut Totals) -> Result<()> {
        while self.input.len() >= 4 {
            let len = i32::from_be_bytes([self.input[0], self.input[1], self.input[2], self.input[3]]);
            ensure!((4..=ANSWER_BYTES_MAX as i32).contains(&len), "an answer claims {len} bytes");
            let whole = 4 + len as usize;
            if self.input.len() < whole {
                break;
            }
            let sent = self.in_flight.pop_front().context("an answer to no request")?;
            let mut correct = 0u32;
            let expected = self.correlation_id.wrapping_sub(self.in_flight.len() as i32 + 1);
            parse_answer(&self.input[4..whole], expected, self.version, |code| match code {
                0 => correct += 1,
                code => *totals.errors.entry(code).or_default() += 1,
            })?;
            let per_batch = sent.bytes / u64::from(sent.batches.max(1));
            let ok =
                Sent { intended: sent.intended, batches: correct, bytes: per_batch * u64::from(correct) };
            totals.answered(now, &ok);
            self.input.advance(whole);
        }
        Ok(())
    }
}

fn uvarint_bytes(mut v: u32) -> usize {
    let mut n = 1;
    while v >= 0x80 {
        v >>= 7;
        n += 1;
    }
    n
}

/// Reads once into the spare room of `buf`; polled anew each time, since a pending read holds nothing.
pub fn poll_read(
    stream: &mut TcpStream,
    cx: &mut std::task::Context<'_>,
    buf: &mut BytesMut,
) -> Poll<std::io::Result<usize>> {
    std::pin::pin!(stream.read_buf(buf)).poll(cx)
}

/// Walks a flexible Produce answer (versions 9 to 12) and reports each partition's error code.
pub fn parse_answer(
    frame: &[u8],
    correlation_id: i32,
    version: i16,
    mut code: impl FnMut(i16),
) -> Result<()> {
    let mut r = Reader(frame);
    ensure!(r.i32()? == correlation_id, "answers came out of order (version {version})");
    r.tags()?;
    for _ in 0..r.compact_len()?.unwrap_or(0) {
        r.compact_bytes()?;
        for _ in 0..r.compact_len()?.unwrap_or(0) {
            r.i32()?;
            code(r.i16()?);
            r.take(24)?;
            for _ in 0..r.compact_len()?.unwrap_or(0) {
                r.i32()?;
                r.compact_bytes()?;
                r.tags()?;
            }
            r.compact_bytes()?;
            r.tags()?;
        }
        r.tags()?;
    }
    r.i32()?;
    r.tags()
}
