//! A disk that one broker finds slow: its writes and reads below a directory are limited by the kernel (cgroup v1, blkio). Where
//! there is no such thing, says so.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const BLKIO: &str = "/sys/fs/cgroup/blkio";

/// The limits of one process at a time; gone with this.
pub struct SlowDisk {
    group: PathBuf,
    device: String,
}

impl SlowDisk {
    /// Of the file system that has `dir`.
    pub fn new(dir: &Path) -> Option<SlowDisk> {
        let group = Path::new(BLKIO).join(format!("flumen-test-{}", std::process::id()));
        let made = std::fs::create_dir_all(&group).and_then(|()| std::fs::metadata(dir));
        let Ok(found) = made.inspect_err(|error| {
            println!("no disk can be made slow here ({}: {error}): this part was not run", group.display());
        }) else {
            return None;
        };
        // As the kernel packs them, for numbers below 256 and 4096.
        let (major, minor) = (found.dev() >> 8 & 0xfff, found.dev() & 0xff | found.dev() >> 12 & 0xfff00);
        Some(SlowDisk { group, device: format!("{major}:{minor}") })
    }

    /// For every thread of this process; 0: as fast as it is.
    pub fn limit(&self, pid: u32, bytes_per_second: u64) -> std::io::Result<()> {
        for what in ["write_bps", "read_bps"] {
            let file = self.group.join(format!("blkio.throttle.{what}_device"));
            std::fs::write(file, format!("{} {bytes_per_second}", self.device))?;
        }
        std::fs::write(self.group.join("cgroup.procs"), pid.to_string())
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        // Processes that still run leave it first.
        let members = std::fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines() {
            let _ = std::fs::write(Path::new(BLKIO).join("cgroup.procs"), pid);
        }
        let _ = std::fs::remove_dir(&self.group);
    }
}
