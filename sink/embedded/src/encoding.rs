//! `Content-Encoding` of request bodies.
//!
//! Pure: bytes in, bytes out. Invariants: an encoding that is not known is refused, never passed on as data; a
//! compressed body that ends early is an error; the plain size is limited. Does not encode responses: an
//! `Accept-Encoding` is answered with identity, which HTTP allows.
#![forbid(unsafe_code)]

use std::io::Read;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum EncodingError {
    #[error(
        "Content-Encoding `{0}` is not supported here; send the body plain, or as gzip, deflate, lz4 or zstd. Nothing was inserted"
    )]
    Unknown(String),
    #[error("the {encoding} body does not decompress: {reason}. Nothing was inserted")]
    Damaged { encoding: &'static str, reason: String },
    #[error("the body has more than {limit} bytes when decompressed. Nothing was inserted")]
    TooLarge { limit: usize },
}

/// Undoes `Content-Encoding`; `None` means that the body is plain already.
pub fn decode(encoding: &str, body: &[u8], limit: usize) -> Result<Option<Vec<u8>>, EncodingError> {
    let name = encoding.trim().to_ascii_lowercase();
    let plain = match name.as_str() {
        "" | "identity" => return Ok(None),
        "gzip" | "x-gzip" => read_all("gzip", flate2::read::MultiGzDecoder::new(body), limit)?,
        "deflate" => read_all("deflate", flate2::read::ZlibDecoder::new(body), limit)?,
        "lz4" => {
            let plain = read_all("lz4", lz4_flex::frame::FrameDecoder::new(body), limit)?;
            if !lz4_is_whole(body) {
                return Err(EncodingError::Damaged { encoding: "lz4", reason: "it ends early".into() });
            }
            plain
        }
        "zstd" => {
            let decoder = zstd::stream::read::Decoder::with_buffer(body)
                .map_err(|e| EncodingError::Damaged { encoding: "zstd", reason: e.to_string() })?;
            read_all("zstd", decoder, limit)?
        }
        _ => return Err(EncodingError::Unknown(encoding.trim().chars().take(40).collect())),
    };
    Ok(Some(plain))
}

/// Whether the LZ4 frames of a body reach their end marks. The decoder cannot tell: it takes an end of input between
/// two blocks for the end of the frame.
fn lz4_is_whole(body: &[u8]) -> bool {
    // Bits of the frame descriptor's first byte.
    const DICTIONARY: u8 = 0x01;
    const CONTENT_CHECKSUM: u8 = 0x04;
    const CONTENT_SIZE: u8 = 0x08;
    const BLOCK_CHECKSUM: u8 = 0x10;
    // High bit of a block's size: the block is stored plain.
    const SIZE_MASK: u32 = 0x7fff_ffff;
    let bit = |flags: u8, mask: u8, bytes: usize| if flags & mask != 0 { bytes } else { 0 };
    let mut at = 0usize;
    while at < body.len() {
        let Some(flags) = body.get(at + 4).copied() else { return false };
        // Magic, two descriptor bytes, the optional fields, the header checksum.
        at += 7 + bit(flags, CONTENT_SIZE, 8) + bit(flags, DICTIONARY, 4);
        loop {
            let Some(Ok(size)) = body.get(at..at + 4).map(<[u8; 4]>::try_from) else { return false };
            at += 4;
            match u32::from_le_bytes(size) & SIZE_MASK {
                0 => break,
                size => at = at.saturating_add(size as usize + bit(flags, BLOCK_CHECKSUM, 4)),
            }
            if at > body.len() {
                return false;
            }
        }
        at += bit(flags, CONTENT_CHECKSUM, 4);
    }
    at == body.len()
}

fn read_all(encoding: &'static str, reader: impl Read, limit: usize) -> Result<Vec<u8>, EncodingError> {
    let mut plain = Vec::new();
    reader
        .take(limit as u64 + 1)
        .read_to_end(&mut plain)
        .map_err(|e| EncodingError::Damaged { encoding, reason: e.to_string() })?;
    if plain.len() > limit {
        return Err(EncodingError::TooLarge { limit });
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn packed(encoding: &str, plain: &[u8]) -> Vec<u8> {
        match encoding {
            "gzip" => {
                let mut w = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                w.write_all(plain).and_then(|()| w.finish()).expect("in memory")
            }
            "deflate" => {
                let mut w = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
                w.write_all(plain).and_then(|()| w.finish()).expect("in memory")
            }
            "lz4" => {
                let mut w = lz4_flex::frame::FrameEncoder::new(Vec::new());
                w.write_all(plain).expect("in memory");
                w.finish().expect("in memory")
            }
            _ => zstd::stream::encode_all(plain, 1).expect("in memory"),
        }
    }

    #[test]
    fn known_encodings_round_trip_and_every_cut_is_noticed() {
        let plain: Vec<u8> = (0..3000u32).flat_map(|i| (i / 3).to_le_bytes()).collect();
        for encoding in ["gzip", "deflate", "lz4", "zstd"] {
            let body = packed(encoding, &plain);
            assert_eq!(decode(encoding, &body, 1 << 20), Ok(Some(plain.clone())), "{encoding}");
            for end in 1..body.len() {
                assert!(decode(encoding, &body[..end], 1 << 20).is_err(), "{encoding} cut at {end}");
            }
            assert!(decode(encoding, &body, 100).is_err(), "{encoding} over the limit");
        }
    }

    #[test]
    fn unknown_encodings_are_refused() {
        for encoding in ["br", "snappy", "xz", "bz2", "gzip, br"] {
            assert!(matches!(decode(encoding, b"1", 10), Err(EncodingError::Unknown(_))), "{encoding}");
        }
        assert_eq!(decode(" Identity ", b"1", 10), Ok(None));
    }
}
