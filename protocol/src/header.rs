//! Request and response headers.
//!
//! A request header names the API before anything about the sender is known, so parsing it must never panic or
//! allocate by a claimed length. The body is not looked at.

use bytes::{BufMut, BytesMut};

use crate::api;
use crate::wire::{Reader, WireError};

/// What stands before every request body. `client_id` is copied, so that keeping it does not pin the frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestHeader {
    pub api_key: i16,
    pub api_version: i16,
    pub correlation_id: i32,
    pub client_id: Option<Box<str>>,
    /// Where the body starts in the frame.
    pub body_offset: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("the request header is cut short")]
    Truncated,
    #[error("API key {api_key} is not served")]
    UnknownApi { api_key: i16 },
    #[error("version {api_version} of API key {api_key} is not served")]
    UnsupportedVersion { api_key: i16, api_version: i16 },
    #[error("the request header is malformed")]
    Malformed,
}

impl From<WireError> for HeaderError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Truncated => Self::Truncated,
            WireError::BadLength => Self::Malformed,
        }
    }
}

/// API key, version and correlation id: the first eight bytes, whose place never changes between versions. Enough to
/// answer an ApiVersions request of an unknown version.
pub fn peek(frame: &[u8]) -> Option<(i16, i16, i32)> {
    let mut reader = Reader::new(frame);
    Some((reader.i16().ok()?, reader.i16().ok()?, reader.i32().ok()?))
}

pub fn parse_request_header(frame: &[u8]) -> Result<RequestHeader, HeaderError> {
    let mut reader = Reader::new(frame);
    let api_key = reader.i16()?;
    let api_version = reader.i16()?;
    let correlation_id = reader.i32()?;
    let spec = api::spec(api_key).ok_or(HeaderError::UnknownApi { api_key })?;
    if !api::supports(api_key, api_version) {
        return Err(HeaderError::UnsupportedVersion { api_key, api_version });
    }
    // The client id keeps its old encoding in flexible headers too: a broker must be able to read it before it
    // knows whether the version is flexible.
    let client_id = match reader.nullable_string(false)? {
        Some(text) => Some(Box::from(std::str::from_utf8(text).map_err(|_| HeaderError::Malformed)?)),
        None => None,
    };
    if api_version >= spec.first_flexible {
        reader.skip_tagged_fields()?;
    }
    let body_offset = frame.len() - reader.remaining();
    Ok(RequestHeader { api_key, api_version, correlation_id, client_id, body_offset })
}

/// Writes the response header that belongs to a request, without a length prefix.
pub fn put_response_header(buf: &mut BytesMut, key: i16, version: i16, correlation_id: i32) {
    buf.put_i32(correlation_id);
    if api::response_header_is_flexible(key, version) {
        buf.put_u8(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(key: i16, version: i16, tail: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&key.to_be_bytes());
        bytes.extend_from_slice(&version.to_be_bytes());
        bytes.extend_from_slice(&77i32.to_be_bytes());
        bytes.extend_from_slice(tail);
        bytes
    }

    #[test]
    fn parses_both_header_versions() {
        let v1 = frame(api::METADATA, 8, &[0, 3, b'a', b'b', b'c', 9, 9]);
        let header = parse_request_header(&v1).expect("v1");
        assert_eq!(header.client_id.as_deref(), Some("abc"));
        assert_eq!((header.correlation_id, header.body_offset), (77, 13));
        // Two tagged fields: tag 0 of one byte, tag 300 of two.
        let v2 = frame(api::METADATA, 9, &[0xff, 0xff, 2, 0, 1, 7, 0xac, 0x02, 2, 8, 8, 5]);
        let header = parse_request_header(&v2).expect("v2");
        assert_eq!(header.client_id, None);
        assert_eq!(&v2[header.body_offset..], &[5]);
    }

    #[test]
    fn refuses_by_name() {
        assert_eq!(parse_request_header(&frame(4, 0, &[])), Err(HeaderError::UnknownApi { api_key: 4 }));
        let unsupported = HeaderError::UnsupportedVersion { api_key: 18, api_version: 99 };
        assert_eq!(parse_request_header(&frame(18, 99, &[])), Err(unsupported));
        assert_eq!(peek(&frame(18, 99, &[])), Some((18, 99, 77)));
        assert_eq!(peek(&[0, 18, 0, 99, 0, 0, 0]), None);
        assert_eq!(parse_request_header(&frame(3, 1, &[0xff, 0xfe])), Err(HeaderError::Malformed));
        assert_eq!(parse_request_header(&frame(3, 1, &[0, 1, 0xff])), Err(HeaderError::Malformed));
        assert_eq!(parse_request_header(&frame(3, 1, &[0, 9, 1])), Err(HeaderError::Truncated));
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = frame(api::METADATA, 9, &[0, 2, b'a', b'b', 1, 0, 3, 1, 2, 3]);
        for end in 0..whole.len() {
            assert!(parse_request_header(&whole[..end]).is_err(), "{end}");
        }
        assert!(parse_request_header(&whole).is_ok());
    }

    #[test]
    fn response_headers_follow_the_version() {
        for (key, version, length) in [(3, 8, 4), (3, 9, 5), (18, 4, 4), (0, 9, 5), (47, 0, 4)] {
            let mut buf = BytesMut::new();
            put_response_header(&mut buf, key, version, 1);
            assert_eq!(buf.len(), length, "{key} v{version}");
        }
    }
}
