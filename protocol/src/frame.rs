//! Cutting a byte stream into length-prefixed frames.
//!
//! Pure: bytes are pushed in, whole frames come out. A frame's claimed length is only a limit, never a reason to
//! allocate: the memory of a partial frame follows the bytes that arrived. An idle connection holds no buffer.

use bytes::{BufMut, BytesMut};

/// Kafka's default for `socket.request.max.bytes`.
pub const REQUEST_BYTES_MAX: usize = 100 << 20;

/// No request or response is shorter: the correlation id alone takes this much.
pub const FRAME_BYTES_MIN: usize = 4;

/// First allocation for a frame that arrives in pieces; most requests fit it whole.
const PARTIAL_BYTES_MIN: usize = 4 << 10;

/// A partial frame may hold this many times what has arrived of it: a frame whose first quarter came with one read gets
/// its final buffer at once and is never copied again.
const PARTIAL_GROWTH: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("frame length {0} is negative or too short for any message")]
    BadLength(i32),
    #[error("frame of {length} bytes is over the limit of {max}")]
    TooLarge { length: usize, max: usize },
}

/// Length of the frame that follows `prefix`.
pub fn frame_length(prefix: [u8; 4], max: usize) -> Result<usize, FrameError> {
    let claimed = i32::from_be_bytes(prefix);
    let length = usize::try_from(claimed).map_err(|_| FrameError::BadLength(claimed))?;
    if length < FRAME_BYTES_MIN {
        return Err(FrameError::BadLength(claimed));
    }
    if length > max {
        return Err(FrameError::TooLarge { length, max });
    }
    Ok(length)
}

/// Reassembles frames from whatever pieces a socket delivers. After an error the stream has lost its frame
/// boundaries and the connection must be closed.
#[derive(Debug)]
pub struct FrameAssembler {
    max_bytes: usize,
    prefix: [u8; 4],
    prefix_len: u8,
    /// Length of the frame in progress; 0 while its prefix is incomplete.
    length: usize,
    partial: BytesMut,
}

impl FrameAssembler {
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, prefix: [0; 4], prefix_len: 0, length: 0, partial: BytesMut::new() }
    }

    /// Changes the limit for frames that have not begun: small before authentication, full after it.
    pub fn set_max_bytes(&mut self, max_bytes: usize) {
        self.max_bytes = max_bytes;
    }

    /// Whether no byte of a further frame has arrived.
    pub fn is_idle(&self) -> bool {
        self.prefix_len == 0
    }

    /// Takes all of `input` and appends the frames it completes to `out`, each in a buffer of its own and without
    /// its prefix. On error, `out` still holds the frames that were whole before it.
    pub fn push(&mut self, mut input: &[u8], out: &mut Vec<BytesMut>) -> Result<(), FrameError> {
        while !input.is_empty() {
            if self.length == 0 {
                let wanted = 4 - usize::from(self.prefix_len);
                let (head, rest) = input.split_at(wanted.min(input.len()));
                let at = usize::from(self.prefix_len);
                self.prefix[at..at + head.len()].copy_from_slice(head);
                self.prefix_len += head.len() as u8;
                input = rest;
                if self.prefix_len < 4 {
                    return Ok(());
                }
                self.length = frame_length(self.prefix, self.max_bytes)?;
                continue;
            }
            let missing = self.length - self.partial.len();
            let (head, rest) = input.split_at(missing.min(input.len()));
            if self.partial.is_empty() && head.len() == self.length {
                // The whole frame is here: one exact buffer, one copy.
                out.push(BytesMut::from(head));
                self.reset();
            } else {
                self.make_room(head.len());
                self.partial.put_slice(head);
                out.extend(self.take_complete());
            }
            input = rest;
        }
        Ok(())
    }

    /// The frame in progress and how many bytes it still lacks, for reading a large rest straight from a socket.
    /// There is room for at least one byte and never for more than are missing.
    pub fn partial_mut(&mut self) -> Option<(&mut BytesMut, usize)> {
        if self.length == 0 {
            return None;
        }
        if self.partial.len() == self.partial.capacity() {
            self.make_room(1);
        }
        let missing = self.length - self.partial.len();
        Some((&mut self.partial, missing))
    }

    /// Takes the frame in progress if a direct read has completed it.
    pub fn take_complete(&mut self) -> Option<BytesMut> {
        if self.length == 0 || self.partial.len() < self.length {
            return None;
        }
        assert_eq!(self.partial.len(), self.length, "a direct read went past the end of its frame");
        let frame = std::mem::take(&mut self.partial);
        self.reset();
        Some(frame)
    }

    fn reset(&mut self) {
        self.prefix_len = 0;
        self.length = 0;
    }

    /// Grows to a multiple of what has arrived, up to the exact length of the frame. Not `BytesMut::reserve`, which may
    /// round up past that length.
    fn make_room(&mut self, more: usize) {
        let needed = self.partial.len() + more;
        if needed <= self.partial.capacity() {
            return;
        }
        let capacity = self.length.min((needed * PARTIAL_GROWTH).max(PARTIAL_BYTES_MIN));
        let mut grown = BytesMut::with_capacity(capacity);
        grown.put_slice(&self.partial);
        self.partial = grown;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(payloads: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for payload in payloads {
            bytes.extend_from_slice(&(payload.len() as i32).to_be_bytes());
            bytes.extend_from_slice(payload);
        }
        bytes
    }

    #[test]
    fn cuts_the_same_frames_whatever_the_pieces() {
        let long = vec![7u8; 10_000];
        let payloads: [&[u8]; 4] = [b"abcd", &long, b"12345678", &long[..4097]];
        let stream = framed(&payloads);
        for piece in [1, 2, 3, 5, 4096, 5000, stream.len()] {
            let mut assembler = FrameAssembler::new(1 << 20);
            let mut out = Vec::new();
            for chunk in stream.chunks(piece) {
                assembler.push(chunk, &mut out).expect("well formed");
            }
            assert_eq!(out.len(), payloads.len(), "pieces of {piece}");
            for (frame, payload) in out.iter().zip(payloads) {
                assert_eq!(frame, payload);
                assert_eq!(frame.capacity(), payload.len(), "exact size, pieces of {piece}");
            }
            assert!(assembler.is_idle() && assembler.partial_mut().is_none());
        }
    }

    #[test]
    fn a_claimed_length_allocates_nothing() {
        let mut assembler = FrameAssembler::new(REQUEST_BYTES_MAX);
        let mut out = Vec::new();
        assembler.push(&(REQUEST_BYTES_MAX as i32).to_be_bytes(), &mut out).expect("allowed");
        assert_eq!(assembler.partial.capacity(), 0);
        let mut received = 0;
        while received < 100_000 {
            assembler.push(&[0; 777], &mut out).expect("allowed");
            received += 777;
            assert!(assembler.partial.capacity() <= (PARTIAL_GROWTH * received).max(PARTIAL_BYTES_MIN));
        }
        assert!(out.is_empty());
    }

    #[test]
    fn a_direct_read_completes_a_frame() {
        let payload: Vec<u8> = (0..50_000u32).map(|i| i as u8).collect();
        let stream = framed(&[&payload]);
        let mut assembler = FrameAssembler::new(REQUEST_BYTES_MAX);
        let mut out = Vec::new();
        assembler.push(&stream[..100], &mut out).expect("well formed");
        let mut at = 100;
        while at < stream.len() {
            let (partial, missing) = assembler.partial_mut().expect("in progress");
            let room = partial.capacity() - partial.len();
            assert!(room >= 1 && room <= missing);
            partial.put_slice(&stream[at..at + room]);
            at += room;
        }
        assert_eq!(assembler.take_complete().as_deref(), Some(payload.as_slice()));
        assert!(assembler.is_idle() && assembler.take_complete().is_none());
        assert!(out.is_empty());
    }

    #[test]
    fn bad_lengths_are_refused_and_earlier_frames_kept() {
        for (prefix, error) in [
            (-1, FrameError::BadLength(-1)),
            (0, FrameError::BadLength(0)),
            (3, FrameError::BadLength(3)),
            (101, FrameError::TooLarge { length: 101, max: 100 }),
        ] {
            let mut stream = framed(&[b"good"]);
            stream.extend_from_slice(&i32::to_be_bytes(prefix));
            let mut out = Vec::new();
            assert_eq!(FrameAssembler::new(100).push(&stream, &mut out), Err(error));
            assert_eq!(out.len(), 1);
        }
    }

    #[test]
    fn an_idle_connection_is_cheap() {
        assert!(size_of::<FrameAssembler>() <= 64);
    }
}
