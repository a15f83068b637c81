//! The first words on a connection, and who may go on speaking.

use crate::wire::{DecodeError, Reader, Writer};

/// Versions of the frames behind the hello that this program speaks.
pub const VERSION_MIN: u16 = 1;
pub const VERSION_MAX: u16 = 1;

const ADDRESS_MAX: usize = 256;
const SENTENCE_MAX: usize = 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub cluster_id: [u8; 16],
    pub node_id: u64,
    /// New at every start of the process: what was said before does not hold any more.
    pub boot_id: u64,
    pub version_min: u16,
    pub version_max: u16,
    /// What the metadata says that all nodes speak; 0 before any was agreed on. Newer frames stay unused until then, so that
    /// a node may go back to the program it came from.
    pub finalized_version: u16,
    /// Format of the data directory.
    pub format: u16,
    /// Which of the sender's shards speaks; the receiver serves the connection on a shard that follows from it.
    pub shard: u16,
    /// Where other brokers reach this one.
    pub address: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalCode {
    OtherCluster,
    SameNode,
    Version,
    /// The metadata does not know this node, or not any more.
    UnknownNode,
    /// It speaks without TLS to one that has certificates.
    Plain,
}

/// Why a connection ends, in words for an operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{sentence}")]
pub struct Refusal {
    pub code: RefusalCode,
    pub sentence: String,
}

impl Hello {
    pub(crate) fn write(&self, out: &mut Writer) {
        out.slice(&self.cluster_id);
        out.u64(self.node_id);
        out.u64(self.boot_id);
        for version in [self.version_min, self.version_max, self.finalized_version, self.format, self.shard] {
            out.u16(version);
        }
        write_text(out, &self.address, ADDRESS_MAX);
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Hello, DecodeError> {
        let hello = Hello {
            cluster_id: reader.array16()?,
            node_id: reader.u64()?,
            boot_id: reader.u64()?,
            version_min: reader.u16()?,
            version_max: reader.u16()?,
            finalized_version: reader.u16()?,
            format: reader.u16()?,
            shard: reader.u16()?,
            address: reader.text("the address", ADDRESS_MAX)?,
        };
        if hello.node_id == 0 || hello.version_min > hello.version_max {
            return Err(DecodeError::Malformed("the hello"));
        }
        // What a later version adds stands behind; this one need not know it.
        let _ = reader.bytes(reader.remaining());
        Ok(hello)
    }
}

impl Refusal {
    pub(crate) fn write(&self, out: &mut Writer) {
        out.u8(match self.code {
            RefusalCode::OtherCluster => 1,
            RefusalCode::SameNode => 2,
            RefusalCode::Version => 3,
            RefusalCode::UnknownNode => 4,
            RefusalCode::Plain => 5,
        });
        write_text(out, &self.sentence, SENTENCE_MAX);
    }

    pub(crate) fn read(reader: &mut Reader) -> Result<Refusal, DecodeError> {
        let code = match reader.u8()? {
            1 => RefusalCode::OtherCluster,
            2 => RefusalCode::SameNode,
            3 => RefusalCode::Version,
            4 => RefusalCode::UnknownNode,
            5 => RefusalCode::Plain,
            _ => return Err(DecodeError::Unknown("the reason of a refusal")),
        };
        Ok(Refusal { code, sentence: reader.text("the sentence", SENTENCE_MAX)? })
    }
}

fn write_text(out: &mut Writer, text: &str, limit: usize) {
    let mut len = text.len().min(limit);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    out.u16(len as u16);
    out.slice(&text.as_bytes()[..len]);
}

/// The version of all further frames: the newest that both speak, and no newer than the finalized one of either.
pub fn negotiate(ours: &Hello, theirs: &Hello) -> Result<u16, Refusal> {
    let refuse = |code, sentence| Err(Refusal { code, sentence });
    if ours.cluster_id != theirs.cluster_id {
        return refuse(
            RefusalCode::OtherCluster,
            format!(
                "node {} at {} belongs to another cluster; correct --seeds, or give the node an empty data directory",
                theirs.node_id, theirs.address
            ),
        );
    }
    if ours.node_id == theirs.node_id {
        return refuse(
            RefusalCode::SameNode,
            format!(
                "the node at {} has the id {} of this one; start one of them with another --node-id",
                theirs.address, theirs.node_id
            ),
        );
    }
    let mut newest = ours.version_max.min(theirs.version_max);
    for finalized in [ours.finalized_version, theirs.finalized_version] {
        if finalized != 0 {
            newest = newest.min(finalized);
        }
    }
    if newest < ours.version_min.max(theirs.version_min) {
        return refuse(
            RefusalCode::Version,
            format!(
                "node {} at {} speaks versions {} to {} (cluster: {}), this one {} to {} (cluster: {}); upgrade the older one \
                 step by step",
                theirs.node_id,
                theirs.address,
                theirs.version_min,
                theirs.version_max,
                theirs.finalized_version,
                ours.version_min,
                ours.version_max,
                ours.finalized_version
            ),
        );
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(node_id: u64, versions: (u16, u16, u16)) -> Hello {
        Hello {
            cluster_id: [1; 16],
            node_id,
            boot_id: 7,
            version_min: versions.0,
            version_max: versions.1,
            finalized_version: versions.2,
            format: 3,
            shard: 0,
            address: format!("10.0.0.{node_id}:33145"),
        }
    }

    #[test]
    fn the_newest_common_version_is_spoken_and_none_that_is_not_final() {
        let version = |a, b| negotiate(&hello(1, a), &hello(2, b)).map_err(|r| r.code);
        assert_eq!(version((1, 3, 0), (2, 5, 0)), Ok(3));
        assert_eq!(version((1, 3, 2), (1, 5, 0)), Ok(2));
        assert_eq!(version((1, 3, 0), (1, 5, 1)), Ok(1));
        assert_eq!(version((1, 2, 0), (3, 5, 0)), Err(RefusalCode::Version));
        assert_eq!(version((3, 5, 0), (1, 4, 2)), Err(RefusalCode::Version));
        for (a, b) in [((1, 3, 0), (2, 5, 2)), ((1, 2, 0), (3, 5, 0))] {
            assert_eq!(version(a, b), version(b, a), "both sides find the same");
        }
    }

    #[test]
    fn strangers_are_told_what_to_do() {
        let ours = hello(1, (1, 1, 0));
        let mut other = hello(2, (1, 1, 0));
        other.cluster_id = [9; 16];
        let refusal = negotiate(&ours, &other).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::OtherCluster);
        assert!(refusal.sentence.contains("--seeds"));
        let twin = Hello { address: "10.0.0.9:33145".to_owned(), ..ours.clone() };
        let refusal = negotiate(&ours, &twin).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::SameNode);
        assert!(refusal.sentence.contains("--node-id") && refusal.sentence.contains("10.0.0.9"));
    }
}
