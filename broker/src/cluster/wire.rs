//! Frames over a socket: reading them one by one, writing them gathered, and noticing that the other side is gone.
//!
//! Bounds: nothing is allocated for a frame before it arrives, a frame arrives whole within `FRAME_TIME_MAX`, a side that
//! says nothing for `SILENCE_MAX` counts as gone, and so does one that takes nothing for `STALL_MAX`.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use flumen_peer::{DecodeError, Frame, FrameError, RawFrame, Refusal, cut_frame};
use tokio::time::{Instant, timeout};

use super::stream::{Reads, Writes};

/// A broker that lives says so this often when it has nothing else to say.
pub const ALIVE_INTERVAL: Duration = Duration::from_millis(500);
/// Six signs of life that did not come. A process that is killed is noticed at once, as its connections close.
pub const SILENCE_MAX: Duration = Duration::from_secs(3);
/// A frame of the largest size takes half a second on a gigabit link.
const FRAME_TIME_MAX: Duration = Duration::from_secs(30);
/// Without a byte taken for so long there is nobody who takes any. (Of TLS: 64 KiB, which is what rustls takes beforehand.)
pub const STALL_MAX: Duration = Duration::from_secs(5);
/// Room for one read.
const READ_BYTES: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the other side closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("a frame that cannot be read: {0}")]
    Decode(#[from] DecodeError),
    #[error("nothing heard for {} s", SILENCE_MAX.as_secs())]
    Silent,
    #[error("a frame did not arrive whole within {} s", FRAME_TIME_MAX.as_secs())]
    Slow,
    #[error("nothing was taken for {} s", STALL_MAX.as_secs())]
    Stalled,
    #[error("{0}")]
    Refused(#[from] Refusal),
    /// In words: the certificates of one side are not to the liking of the other, or only one has any.
    #[error("{0}")]
    Tls(String),
    #[error("{0} where it makes no sense")]
    Unexpected(&'static str),
}

/// Cuts frames out of what a socket brings.
pub struct FrameReader {
    input: BytesMut,
    begun: Option<Instant>,
}

impl FrameReader {
    pub fn new(input: BytesMut) -> FrameReader {
        FrameReader { input, begun: None }
    }

    /// What has been read and not been taken.
    pub fn into_rest(self) -> BytesMut {
        self.input
    }

    pub async fn next(&mut self, reads: &mut Reads, body_max: usize) -> Result<RawFrame, LinkError> {
        loop {
            if let Some(raw) = cut_frame(&mut self.input, body_max)? {
                self.begun = None;
                return Ok(raw);
            }
            if self.input.is_empty() {
                self.begun = None;
            } else if self.begun.get_or_insert_with(Instant::now).elapsed() > FRAME_TIME_MAX {
                return Err(LinkError::Slow);
            }
            self.input.reserve(READ_BYTES);
            match timeout(SILENCE_MAX, reads.read(&mut self.input)).await {
                Err(_) => return Err(LinkError::Silent),
                Ok(Ok(0)) => return Err(LinkError::Closed),
                Ok(Ok(_)) => {}
                Ok(Err(error)) => return Err(error.into()),
            }
        }
    }

    pub async fn next_frame(&mut self, reads: &mut Reads, body_max: usize) -> Result<Frame, LinkError> {
        Ok(Frame::decode(self.next(reads, body_max).await?)?)
    }
}

pub async fn write_frame(writes: &mut Writes, frame: &Frame, version: u16) -> Result<(), LinkError> {
    writes.write(&mut frame.encode(version).into()).await
}
