//! The four codecs of Kafka batches, with bounded output.
//!
//! Decompression writes at most `max_bytes` and stops there, so a small hostile batch cannot fill memory; nor does a
//! size it merely claims allocate anything. Used for export, compaction and look-ups, never on the produce path.

use std::cell::RefCell;
use std::io::{Read, Write};

use zstd::zstd_safe;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Compression {
    #[default]
    None,
    Gzip,
    Snappy,
    Lz4,
    Zstd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CompressionError {
    #[error("decompressed size is over the limit of {max_bytes} bytes")]
    TooLarge { max_bytes: usize },
    #[error("corrupt {0:?} data")]
    Corrupt(Compression),
}

impl Compression {
    /// From the low three bits of a batch's attributes.
    pub fn from_id(id: i16) -> Option<Self> {
        Some(match id {
            0 => Self::None,
            1 => Self::Gzip,
            2 => Self::Snappy,
            3 => Self::Lz4,
            4 => Self::Zstd,
            _ => return None,
        })
    }

    pub fn id(self) -> i16 {
        match self {
            Self::None => 0,
            Self::Gzip => 1,
            Self::Snappy => 2,
            Self::Lz4 => 3,
            Self::Zstd => 4,
        }
    }

    /// The name Kafka uses in `compression.type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// snappy-java's stream header: magic, version 1, oldest compatible version 1.
const XERIAL_HEADER: [u8; 16] = *b"\x82SNAPPY\0\0\0\0\x01\0\0\0\x01";
const XERIAL_MAGIC: &[u8] = b"\x82SNAPPY\0";
/// Block size snappy-java writes by default.
const XERIAL_BLOCK_BYTES: usize = 32 << 10;
/// Snappy's densest element copies 64 bytes for 3, so nothing valid expands further than this.
const SNAPPY_RATIO_MAX: usize = 22;

const LZ4_MAGIC: u32 = 0x184D_2204;
/// A byte of an LZ4 length adds at most 255 bytes of output.
const LZ4_RATIO_MAX: usize = 256;
/// How far back a linked LZ4 block may refer.
const LZ4_WINDOW_BYTES: usize = 64 << 10;

const ZSTD_LEVEL: i32 = 3;
/// First guess for a zstd frame that does not say its size.
const ZSTD_FIRST_GUESS_RATIO: usize = 4;
const GUESS_BYTES_MIN: usize = 4 << 10;
/// `ZSTD_error_dstSize_tooSmall`, as zstd returns it: negated in a `size_t`.
const ZSTD_DESTINATION_TOO_SMALL: usize = 0usize.wrapping_sub(70);

/// Compresses into a new buffer, in the framing Java clients write.
pub fn compress(codec: Compression, input: &[u8]) -> Vec<u8> {
    // Writing to a `Vec` cannot fail, nor can a codec refuse input of a valid size.
    match codec {
        Compression::None => input.to_vec(),
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(input).expect("write to memory");
            encoder.finish().expect("write to memory")
        }
        Compression::Snappy => {
            let mut out = XERIAL_HEADER.to_vec();
            let mut encoder = snap::raw::Encoder::new();
            for block in input.chunks(XERIAL_BLOCK_BYTES) {
                let compressed = encoder.compress_vec(block).expect("a block of 32 KiB");
                out.extend_from_slice(&(compressed.len() as u32).to_be_bytes());
                out.extend_from_slice(&compressed);
            }
            out
        }
        Compression::Lz4 => {
            // Java refuses linked blocks.
            let info = lz4_flex::frame::FrameInfo::new()
                .block_size(lz4_flex::frame::BlockSize::Max64KB)
                .block_mode(lz4_flex::frame::BlockMode::Independent);
            let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(info, Vec::new());
            encoder.write_all(input).expect("write to memory");
            encoder.finish().expect("write to memory")
        }
        Compression::Zstd => zstd::bulk::compress(input, ZSTD_LEVEL).expect("write to memory"),
    }
}

/// Replaces the content of `out` with the decompressed input, at most `max_bytes` of it. On error `out` is cleared.
pub fn decompress(
    codec: Compression,
    input: &[u8],
    out: &mut Vec<u8>,
    max_bytes: usize,
) -> Result<(), CompressionError> {
    out.clear();
    let result = match codec {
        Compression::None if input.len() > max_bytes => Err(CompressionError::TooLarge { max_bytes }),
        Compression::None => {
            out.extend_from_slice(input);
            Ok(())
        }
        Compression::Gzip => gunzip(input, out, max_bytes),
        Compression::Snappy => unsnap(input, out, max_bytes),
        Compression::Lz4 => unlz4(input, out, max_bytes),
        Compression::Zstd => unzstd(input, out, max_bytes),
    };
    if result.is_err() {
        out.clear();
    }
    result
}

fn gunzip(input: &[u8], out: &mut Vec<u8>, max_bytes: usize) -> Result<(), CompressionError> {
    let decoder = flate2::bufread::MultiGzDecoder::new(input);
    // One byte over the limit tells a full stream from a cut one.
    let limit = (max_bytes as u64).saturating_add(1);
    decoder.take(limit).read_to_end(out).map_err(|_| CompressionError::Corrupt(Compression::Gzip))?;
    if out.len() > max_bytes {
        return Err(CompressionError::TooLarge { max_bytes });
    }
    Ok(())
}

fn unsnap(input: &[u8], out: &mut Vec<u8>, max_bytes: usize) -> Result<(), CompressionError> {
    const CORRUPT: CompressionError = CompressionError::Corrupt(Compression::Snappy);
    if !input.starts_with(XERIAL_MAGIC) {
        return unsnap_block(input, out, max_bytes);
    }
    let mut rest = input.get(XERIAL_HEADER.len()..).ok_or(CORRUPT)?;
    while !rest.is_empty() {
        // Streams may be concatenated: a stream header may stand where a block is expected.
        if rest.starts_with(XERIAL_MAGIC) {
            rest = rest.get(XERIAL_HEADER.len()..).ok_or(CORRUPT)?;
            continue;
        }
        let (length, tail) = rest.split_first_chunk::<4>().ok_or(CORRUPT)?;
        let (block, tail) = tail.split_at_checked(u32::from_be_bytes(*length) as usize).ok_or(CORRUPT)?;
        unsnap_block(block, out, max_bytes)?;
        rest = tail;
    }
    Ok(())
}

/// Appends one raw snappy block.
fn unsnap_block(block: &[u8], out: &mut Vec<u8>, max_bytes: usize) -> Result<(), CompressionError> {
    const CORRUPT: CompressionError = CompressionError::Corrupt(Compression::Snappy);
    let length = snap::raw::decompress_len(block).map_err(|_| CORRUPT)?;
    if length > block.len().saturating_mul(SNAPPY_RATIO_MAX) {
        return Err(CORRUPT);
    }
    let done = out.len();
    if length > max_bytes.saturating_sub(done) {
        return Err(CompressionError::TooLarge { max_bytes });
    }
    out.resize(done + length, 0);
    let written = snap::raw::Decoder::new().decompress(block, &mut out[done..]).map_err(|_| CORRUPT)?;
    out.truncate(done + written);
    Ok(())
}

/// Own reader of LZ4 frames over the block decoder: the library's reserves a whole block (up to 8 MiB) for any frame.
/// Checksums are skipped, since the batch's own covers the same bytes, and old Kafka clients wrote wrong ones.
fn unlz4(input: &[u8], out: &mut Vec<u8>, max_bytes: usize) -> Result<(), CompressionError> {
    const CORRUPT: CompressionError = CompressionError::Corrupt(Compression::Lz4);
    let mut rest = input;
    while !rest.is_empty() {
        let (&[m0, m1, m2, m3, flags, descriptor], tail) = rest.split_first_chunk::<6>().ok_or(CORRUPT)?;
        if u32::from_le_bytes([m0, m1, m2, m3]) != LZ4_MAGIC || flags >> 6 != 1 {
            return Err(CORRUPT);
        }
        let linked = flags & 0x20 == 0;
        let block_checksum_bytes = if flags & 0x10 != 0 { 4 } else { 0 };
        let content_size_bytes = if flags & 0x08 != 0 { 8 } else { 0 };
        let content_checksum_bytes = if flags & 0x04 != 0 { 4 } else { 0 };
        if flags & 0x01 != 0 {
            // A preset dictionary, which Kafka has no way to name.
            return Err(CORRUPT);
        }
        let block_bytes_max = match (descriptor >> 4) & 7 {
            4 => 64 << 10,
            5 => 256 << 10,
            6 => 1 << 20,
            7 => 4 << 20,
            _ => return Err(CORRUPT),
        };
        // The header ends with its checksum byte.
        rest = tail.get(content_size_bytes + 1..).ok_or(CORRUPT)?;
        loop {
            let (length, tail) = rest.split_first_chunk::<4>().ok_or(CORRUPT)?;
            let length = u32::from_le_bytes(*length);
            if length == 0 {
                rest = tail.get(content_checksum_bytes..).ok_or(CORRUPT)?;
                break;
            }
            let stored = length & 0x8000_0000 != 0;
            let (block, tail) = tail.split_at_checked((length & 0x7fff_ffff) as usize).ok_or(CORRUPT)?;
            let room = max_bytes.saturating_sub(out.len());
            if stored {
                if block.len() > room {
                    return Err(CompressionError::TooLarge { max_bytes });
                }
                out.extend_from_slice(block);
            } else {
                unlz4_block(block, linked, block_bytes_max, out, max_bytes)?;
            }
            rest = tail.get(block_checksum_bytes..).ok_or(CORRUPT)?;
        }
    }
    Ok(())
}

/// Appends one compressed LZ4 block.
fn unlz4_block(
    block: &[u8],
    linked: bool,
    block_bytes_max: usize,
    out: &mut Vec<u8>,
    max_bytes: usize,
) -> Result<(), CompressionError> {
    let possible = block_bytes_max.min(block.len().saturating_mul(LZ4_RATIO_MAX));
    let done = out.len();
    let room = possible.min(max_bytes.saturating_sub(done));
    out.resize(done + room, 0);
    let (before, after) = out.split_at_mut(done);
    let result = if linked && done > 0 {
        let window = &before[done.saturating_sub(LZ4_WINDOW_BYTES)..];
        lz4_flex::block::decompress_into_with_dict(block, after, window)
    } else {
        lz4_flex::block::decompress_into(block, after)
    };
    match result {
        Ok(written) => {
            out.truncate(done + written);
            Ok(())
        }
        Err(lz4_flex::block::DecompressError::OutputTooSmall { .. }) if room < possible => {
            Err(CompressionError::TooLarge { max_bytes })
        }
        Err(_) => Err(CompressionError::Corrupt(Compression::Lz4)),
    }
}

thread_local! {
    /// A zstd context takes 150 KiB to set up; one per thread that decompresses.
    static ZSTD: RefCell<Option<zstd_safe::DCtx<'static>>> = const { RefCell::new(None) };
}

/// One-shot decoding into a growing buffer: the streaming decoder would allocate the window a frame claims, up to
/// 128 MiB for a few bytes.
fn unzstd(input: &[u8], out: &mut Vec<u8>, max_bytes: usize) -> Result<(), CompressionError> {
    const CORRUPT: CompressionError = CompressionError::Corrupt(Compression::Zstd);
    if input.is_empty() {
        return Err(CORRUPT);
    }
    // A claimed size is only a hint: it is not trusted beyond the first guess's ratio.
    let guess = input.len().saturating_mul(ZSTD_FIRST_GUESS_RATIO).max(GUESS_BYTES_MIN);
    let mut capacity = match zstd_safe::get_frame_content_size(input) {
        Ok(Some(claimed)) => usize::try_from(claimed).unwrap_or(usize::MAX).min(guess.saturating_mul(2)),
        _ => guess,
    }
    .clamp(1, max_bytes.max(1));
    ZSTD.with_borrow_mut(|slot| {
        let context = match slot {
            Some(context) => context,
            None => slot.insert(zstd_safe::DCtx::try_create().ok_or(CORRUPT)?),
        };
        loop {
            out.clear();
            out.reserve_exact(capacity);
            match context.decompress(out, input) {
                Ok(_) if out.len() <= max_bytes => return Ok(()),
                Ok(_) => return Err(CompressionError::TooLarge { max_bytes }),
                Err(ZSTD_DESTINATION_TOO_SMALL) if out.capacity() < max_bytes => {
                    capacity = out.capacity().saturating_mul(4).min(max_bytes);
                }
                Err(ZSTD_DESTINATION_TOO_SMALL) => return Err(CompressionError::TooLarge { max_bytes }),
                Err(_) => return Err(CORRUPT),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODECS: [Compression; 5] =
        [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4, Compression::Zstd];

    /// Neither all alike nor random: text with numbers.
    fn sample(bytes: usize) -> Vec<u8> {
        (0u32..)
            .flat_map(|n| format!("line {n} of {} ", n.wrapping_mul(2_654_435_761)).into_bytes())
            .take(bytes)
            .collect()
    }

    #[test]
    fn round_trips_at_exactly_the_limit_and_not_below() {
        for codec in CODECS {
            for size in [0, 1, 100, 32_768, 32_769, 65_536, 1_000_000] {
                let input = sample(size);
                let compressed = compress(codec, &input);
                let mut out = b"left over".to_vec();
                assert_eq!(decompress(codec, &compressed, &mut out, size), Ok(()), "{codec:?} {size}");
                assert_eq!(out, input);
                if size > 0 {
                    let error = Err(CompressionError::TooLarge { max_bytes: size - 1 });
                    assert_eq!(decompress(codec, &compressed, &mut out, size - 1), error, "{codec:?} {size}");
                    assert!(out.is_empty());
                }
            }
        }
    }

    #[test]
    fn bombs_stop_at_the_limit() {
        let zeros = vec![0; 20 << 20];
        for codec in CODECS {
            let bomb = compress(codec, &zeros);
            let mut out = Vec::new();
            let error = Err(CompressionError::TooLarge { max_bytes: 100_000 });
            assert_eq!(decompress(codec, &bomb, &mut out, 100_000), error, "{codec:?}");
            assert!(out.capacity() <= 400_000, "{codec:?} {}", out.capacity());
        }
    }

    #[test]
    fn snappy_is_read_raw_and_framed_and_concatenated() {
        let input = sample(50_000);
        let mut out = Vec::new();
        let raw = snap::raw::Encoder::new().compress_vec(&input).expect("compresses");
        assert_eq!(decompress(Compression::Snappy, &raw, &mut out, 50_000), Ok(()));
        assert_eq!(out, input);
        let framed = compress(Compression::Snappy, &input);
        let twice = [framed.as_slice(), &framed].concat();
        assert_eq!(decompress(Compression::Snappy, &twice, &mut out, 100_000), Ok(()));
        assert_eq!(out, [input.as_slice(), &input].concat());
    }

    #[test]
    fn lz4_frames_of_every_kind_are_read() {
        use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
        let input = sample(700_000);
        for mode in [BlockMode::Independent, BlockMode::Linked] {
            for size in [BlockSize::Max64KB, BlockSize::Max256KB, BlockSize::Max4MB] {
                for checks in [false, true] {
                    let info = FrameInfo::new()
                        .block_mode(mode)
                        .block_size(size)
                        .block_checksums(checks)
                        .content_checksum(checks)
                        .content_size(checks.then_some(700_000));
                    let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
                    encoder.write_all(&input).expect("compresses");
                    let compressed = encoder.finish().expect("compresses");
                    let mut out = Vec::new();
                    assert_eq!(decompress(Compression::Lz4, &compressed, &mut out, 700_000), Ok(()));
                    assert_eq!(out, input);
                }
            }
        }
    }

    #[test]
    fn lz4_written_here_is_read_by_the_library() {
        let input = sample(300_000);
        let compressed = compress(Compression::Lz4, &input);
        let mut out = Vec::new();
        lz4_flex::frame::FrameDecoder::new(compressed.as_slice()).read_to_end(&mut out).expect("valid frame");
        assert_eq!(out, input);
    }

    #[test]
    fn zstd_streams_without_a_size_are_read() {
        let input = sample(3_000_000);
        let compressed = zstd::stream::encode_all(input.as_slice(), 19).expect("compresses");
        assert_eq!(
            zstd_safe::get_frame_content_size(&compressed).ok().flatten(),
            None,
            "as Java writes them"
        );
        let mut out = Vec::new();
        assert_eq!(decompress(Compression::Zstd, &compressed, &mut out, 3_000_000), Ok(()));
        assert_eq!(out, input);
    }

    #[test]
    fn garbage_is_corrupt() {
        for codec in &CODECS[1..] {
            let mut out = Vec::new();
            let error = Err(CompressionError::Corrupt(*codec));
            assert_eq!(decompress(*codec, b"no codec wrote this", &mut out, 1000), error);
        }
    }

    #[test]
    fn ids_and_names_agree() {
        for (id, codec) in CODECS.into_iter().enumerate() {
            assert_eq!((Compression::from_id(id as i16), codec.id()), (Some(codec), id as i16));
        }
        assert_eq!(Compression::from_id(5), None);
    }
}
