//! Topics inside a consumer's subscription, the metadata members of protocol type `consumer` join with.
//!
//! Needed to know which offsets a living group still uses. Only the head of the format is read, which all its
//! versions share: version, then an array of topic names.

use std::collections::BTreeSet;

use crate::record::{Reader, RecordError};

/// Adds the topics of one subscription to `topics`.
pub(crate) fn add_topics(metadata: &[u8], topics: &mut BTreeSet<String>) -> Result<(), RecordError> {
    let mut reader = Reader { rest: metadata };
    let version = reader.i16()?;
    if version < 0 {
        return Err(RecordError::UnknownVersion(version));
    }
    let count = reader.i32()?;
    if count < 0 {
        return Err(RecordError::BadLength(count.into()));
    }
    for _ in 0..count {
        topics.insert(reader.string()?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_topics_and_refuses_rubbish() {
        let mut topics = BTreeSet::new();
        add_topics(b"\x00\x03\0\0\0\x02\0\x01a\0\x02bc\xff\xff\xff\xff", &mut topics).unwrap();
        assert_eq!(topics.into_iter().collect::<Vec<_>>(), ["a", "bc"]);
        for bad in [&b""[..], b"\xff\xff\0\0\0\0", b"\0\0\xff\xff\xff\xff", b"\0\0\x7f\xff\xff\xff\0\x01a"] {
            assert!(add_topics(bad, &mut BTreeSet::new()).is_err());
        }
    }
}
