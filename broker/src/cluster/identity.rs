//! Which cluster a data directory belongs to: `<data dir>/cluster`, a few lines of text with a checksum.
//!
//! Written whole (temporary file, sync, rename, sync of the directory) before the node acts as a member, and never made
//! to say another cluster or node afterwards. It does not decide anything; `bootstrap` does.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use uuid::Uuid;

const FILE: &str = "cluster";
const FIRST_LINE: &str = "flumen-cluster 1";
/// Five founders take some 300 bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// A founder votes about the metadata; more voters only make every change of it slower.
pub const FOUNDERS_MAX: usize = 5;

/// 16 random bytes, written as Kafka prints them: URL-safe base64 without padding.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ClusterId(pub [u8; 16]);

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const ID_CHARS: u32 = 22;

impl ClusterId {
    pub fn random() -> ClusterId {
        ClusterId(*Uuid::new_v4().as_bytes())
    }
}

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = u128::from_be_bytes(self.0);
        // 22 digits of 6 bits; the last one carries the remaining 2 bits.
        for i in 0..ID_CHARS {
            let digit = if i < ID_CHARS - 1 { bits >> (122 - 6 * i) } else { bits << 4 };
            write!(f, "{}", char::from(ALPHABET[(digit & 63) as usize]))?;
        }
        Ok(())
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for ClusterId {
    type Err = String;

    fn from_str(text: &str) -> Result<ClusterId, String> {
        let wrong = || format!("'{text}' is no cluster id");
        if text.len() != ID_CHARS as usize {
            return Err(wrong());
        }
        let mut bits = 0u128;
        for (i, c) in (0..ID_CHARS).zip(text.bytes()) {
            let digit = ALPHABET.iter().position(|a| *a == c).ok_or_else(wrong)? as u128;
            bits |= if i < ID_CHARS - 1 { digit << (122 - 6 * i) } else { digit >> 4 };
        }
        let id = ClusterId(bits.to_be_bytes());
        if id.to_string() == text { Ok(id) } else { Err(wrong()) }
    }
}

/// A node that formed the cluster, and where it was then.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Founder {
    pub node_id: i32,
    pub address: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub cluster_id: ClusterId,
    pub node_id: i32,
    /// Made with the directory; tells a restarted node from another one under its id.
    pub directory_id: Uuid,
    /// In the order of their ids.
    pub founders: Vec<Founder>,
    /// The cluster has confirmed this node once. If it does not know the node later, the node was removed.
    pub registered: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error(
        "{path} is damaged ({what}); restore it from a copy, or give the node an empty data directory and another --node-id"
    )]
    Damaged { path: PathBuf, what: &'static str },
}

impl Identity {
    fn encode(&self) -> String {
        let mut text = format!(
            "{FIRST_LINE}\ncluster_id {}\nnode_id {}\ndirectory_id {}\nregistered {}\n",
            self.cluster_id, self.node_id, self.directory_id, self.registered
        );
        for founder in &self.founders {
            text.push_str(&format!("founder {} {}\n", founder.node_id, founder.address));
        }
        let checksum = crc32c::crc32c(text.as_bytes());
        text.push_str(&format!("checksum {checksum:08x}\n"));
        text
    }

    fn decode(text: &str) -> Result<Identity, &'static str> {
        let at = text.rfind("checksum ").ok_or("no checksum")?;
        let (body, end) = text.split_at(at);
        let checksum = u32::from_str_radix(end["checksum ".len()..].trim_end(), 16);
        if checksum != Ok(crc32c::crc32c(body.as_bytes())) {
            return Err("the checksum does not match");
        }
        let mut lines = body.lines();
        if lines.next() != Some(FIRST_LINE) {
            return Err("it is of another version");
        }
        let mut value = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ').map(str::to_string);
        let cluster_id = value("cluster_id").and_then(|v| v.parse().ok()).ok_or("cluster_id")?;
        let node_id = value("node_id").and_then(|v| v.parse().ok()).ok_or("node_id")?;
        let directory_id = value("directory_id").and_then(|v| v.parse().ok()).ok_or("directory_id")?;
        let registered = value("registered").and_then(|v| v.parse().ok()).ok_or("registered")?;
        let mut founders = Vec::new();
        while let Some(founder) = value("founder") {
            let (id, address) = founder.split_once(' ').ok_or("founder")?;
            founders
                .push(Founder { node_id: id.parse().map_err(|_| "founder")?, address: address.to_string() });
        }
        if founders.is_empty() || founders.len() > FOUNDERS_MAX {
            return Err("founder");
        }
        Ok(Identity { cluster_id, node_id, directory_id, founders, registered })
    }

    /// None when the directory belongs to no cluster yet.
    pub fn load(data_dir: &Path) -> Result<Option<Identity>, IdentityError> {
        let path = data_dir.join(FILE);
        let io = |error| IdentityError::Io { path: path.clone(), error };
        match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io(error)),
            Ok(found) if found.len() > FILE_BYTES_MAX => {
                return Err(IdentityError::Damaged { path, what: "it is too long" });
            }
            Ok(_) => {}
        }
        let bytes = fs::read(&path).map_err(io)?;
        let text = String::from_utf8_lossy(&bytes);
        Identity::decode(&text).map(Some).map_err(|what| IdentityError::Damaged { path, what })
    }

    pub fn store(&self, data_dir: &Path) -> Result<(), IdentityError> {
        let path = data_dir.join(FILE);
        write_whole(data_dir, FILE, self.encode().as_bytes())
            .map_err(|error| IdentityError::Io { path, error })
    }
}

/// A small file, which is the old one or the new one whenever the power goes.
pub(crate) fn write_whole(directory: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = directory.join(format!("{name}.tmp"));
    let mut file = fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, directory.join(name))?;
    flumen_io::FileSystem::machine().sync_dir(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            cluster_id: ClusterId([7, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]),
            node_id: 2,
            directory_id: Uuid::from_u128(99),
            founders: vec![
                Founder { node_id: 1, address: "a.example:33145".into() },
                Founder { node_id: 2, address: "[::1]:7".into() },
            ],
            registered: false,
        }
    }

    #[test]
    fn ids_are_written_as_kafka_writes_them() {
        for id in [ClusterId([0; 16]), ClusterId([255; 16]), identity().cluster_id, ClusterId::random()] {
            let text = id.to_string();
            assert_eq!(text.len(), 22);
            assert_eq!(text.parse(), Ok(id));
        }
        assert_eq!(ClusterId([255; 16]).to_string(), "_____________________w");
        for bad in ["", "______________________", "_____________________w_", "!____________________w"] {
            assert!(bad.parse::<ClusterId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_file_comes_back_or_is_called_damaged() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap(), None);
        identity().store(dir.path()).unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap(), Some(identity()));
        let registered = Identity { registered: true, ..identity() };
        registered.store(dir.path()).unwrap();
        assert_eq!(Identity::load(dir.path()).unwrap(), Some(registered));
        let path = dir.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() - 1 {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert!(Identity::load(dir.path()).is_err(), "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert!(Identity::load(dir.path()).is_err(), "cut at {at}");
        }
        fs::write(&path, vec![b'x'; 100 << 10]).unwrap();
        assert!(Identity::load(dir.path()).unwrap_err().to_string().contains("too long"));
    }
}
