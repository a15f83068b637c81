//! ClickHouse's compressed blocks, as `compress=1` and `decompress=1` put them on the wire.
//!
//! Owns the framing only; pure. A block is: CityHash128 of what follows (16 bytes), method (1), size with this
//! 9-byte header (u32), size of the plain bytes (u32), payload. Invariants: nothing is decoded before its checksum
//! is right; the plain size is limited before memory is asked for; a body that ends inside a block is an error, so a
//! cut insert can never look like a short one. Does not stream: both sides are whole bodies.
#![forbid(unsafe_code)]

use crate::cityhash;

const METHOD_NONE: u8 = 0x02;
const METHOD_LZ4: u8 = 0x82;
const METHOD_ZSTD: u8 = 0x90;
const CHECKSUM_BYTES: usize = 16;
const HEADER_BYTES: usize = 9;
/// Plain bytes per block that we send: ClickHouse's own default.
const BLOCK_BYTES: usize = 1 << 20;
/// Largest plain block that we accept: ClickHouse's own limit.
const MAX_BLOCK_BYTES: usize = 1 << 30;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BlockError {
    #[error("the body ends inside a compressed block, after {at} bytes: it was cut")]
    Cut { at: usize },
    #[error("checksum of the compressed block at byte {at} is wrong: the body was damaged on its way")]
    Checksum { at: usize },
    #[error("unknown compression method 0x{method:02x} at byte {at}; known are LZ4, ZSTD and NONE")]
    Method { method: u8, at: usize },
    #[error("the compressed block at byte {at} claims sizes that cannot be ({what})")]
    Size { at: usize, what: &'static str },
    #[error("the compressed block at byte {at} does not decompress: {reason}")]
    Payload { at: usize, reason: String },
    #[error("the body has more than {limit} bytes when decompressed")]
    TooLarge { limit: usize },
}

/// Decodes all blocks of a body; at most `limit` plain bytes.
pub fn decode(body: &[u8], limit: usize) -> Result<Vec<u8>, BlockError> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < body.len() {
        let rest = &body[at..];
        let header = rest.get(CHECKSUM_BYTES..CHECKSUM_BYTES + HEADER_BYTES).ok_or(BlockError::Cut { at })?;
        let packed = u32::from_le_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let plain = u32::from_le_bytes([header[5], header[6], header[7], header[8]]) as usize;
        if packed < HEADER_BYTES {
            return Err(BlockError::Size { at, what: "smaller than its own header" });
        }
        if plain > MAX_BLOCK_BYTES || packed > MAX_BLOCK_BYTES {
            return Err(BlockError::Size { at, what: "more than 1 GiB" });
        }
        let hashed = rest.get(CHECKSUM_BYTES..CHECKSUM_BYTES + packed).ok_or(BlockError::Cut { at })?;
        if cityhash::checksum(hashed) != rest[..CHECKSUM_BYTES] {
            return Err(BlockError::Checksum { at });
        }
        if out.len().saturating_add(plain) > limit {
            return Err(BlockError::TooLarge { limit });
        }
        let payload = &hashed[HEADER_BYTES..];
        let bad = |reason: String| BlockError::Payload { at, reason };
        let decoded = match header[0] {
            METHOD_NONE => payload.to_vec(),
            METHOD_LZ4 => lz4_flex::block::decompress(payload, plain).map_err(|e| bad(e.to_string()))?,
            METHOD_ZSTD => zstd::bulk::decompress(payload, plain).map_err(|e| bad(e.to_string()))?,
            method => return Err(BlockError::Method { method, at }),
        };
        if decoded.len() != plain {
            return Err(BlockError::Size { at, what: "the payload has another length than the header says" });
        }
        out.extend_from_slice(&decoded);
        at += CHECKSUM_BYTES + packed;
    }
    Ok(out)
}

/// LZ4 blocks for a response asked for with `compress=1`.
pub fn encode(plain: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(plain.len() / 2 + 64);
    for chunk in plain.chunks(BLOCK_BYTES) {
        let payload = lz4_flex::block::compress(chunk);
        let mut block = Vec::with_capacity(HEADER_BYTES + payload.len());
        block.push(METHOD_LZ4);
        // Both sizes are below 2 MiB: a chunk is at most 1 MiB and LZ4 adds less than 1 %.
        block.extend_from_slice(&((HEADER_BYTES + payload.len()) as u32).to_le_bytes());
        block.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
        block.extend_from_slice(&payload);
        out.extend_from_slice(&cityhash::checksum(&block));
        out.extend_from_slice(&block);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * i / 7 + i / 300) as u8).collect()
    }

    #[test]
    fn round_trip_of_many_sizes() {
        for len in
            [0, 1, 3, 7, 8, 9, 16, 17, 127, 128, 129, 144, 200, 1000, BLOCK_BYTES, BLOCK_BYTES + 1, 3_000_000]
        {
            let plain = sample(len);
            assert_eq!(decode(&encode(&plain), usize::MAX), Ok(plain), "length {len}");
        }
    }

    #[test]
    fn every_cut_and_every_changed_byte_is_noticed() {
        let packed = encode(&sample(600));
        for end in 1..packed.len() {
            assert!(decode(&packed[..end], usize::MAX).is_err(), "cut at {end}");
        }
        for at in 0..packed.len() {
            let mut damaged = packed.clone();
            damaged[at] ^= 0x10;
            assert!(decode(&damaged, usize::MAX).is_err(), "changed byte {at}");
        }
    }

    #[test]
    fn the_limit_holds_before_memory_is_taken() {
        let packed = encode(&sample(5000));
        assert_eq!(decode(&packed, 4999), Err(BlockError::TooLarge { limit: 4999 }));
    }

    #[test]
    fn zstd_and_plain_blocks_are_read() {
        let plain = sample(5000);
        for (method, payload) in [
            (METHOD_NONE, plain.clone()),
            (METHOD_ZSTD, zstd::bulk::compress(&plain, 1).expect("zstd in memory")),
        ] {
            let mut block = vec![method];
            block.extend_from_slice(&((HEADER_BYTES + payload.len()) as u32).to_le_bytes());
            block.extend_from_slice(&(plain.len() as u32).to_le_bytes());
            block.extend_from_slice(&payload);
            let mut body = cityhash::checksum(&block).to_vec();
            body.extend_from_slice(&block);
            assert_eq!(decode(&body, usize::MAX), Ok(plain.clone()));
        }
    }
}
