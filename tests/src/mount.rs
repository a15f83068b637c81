//! Small file systems for tests: one that fills up, one that cannot be written to. Needs the right to mount; where there
//! is none, says so.

use std::path::{Path, PathBuf};
use std::process::Command;

pub struct Mount {
    pub path: PathBuf,
}

impl Mount {
    /// An ext4 file system of this size in a file of its own; `None`, and a line that says why, where that cannot be.
    pub fn ext4(dir: &Path, mib: u64) -> Option<Mount> {
        let (image, path) = (dir.join("disk.img"), dir.join("disk"));
        std::fs::create_dir_all(&path).ok()?;
        let file = std::fs::File::create(&image).ok()?;
        file.set_len(mib << 20).ok()?;
        // Without a journal nearly all of it is for the test.
        let made = run(Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal", "-m", "0"]).arg(&image));
        let mounted = made && run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&path));
        if !mounted {
            println!(
                "no small file system could be made here (mkfs.ext4, mount -o loop): this part was not run"
            );
            return None;
        }
        Some(Mount { path })
    }

    /// An empty file system that nobody can write to.
    pub fn read_only(dir: &Path) -> Option<Mount> {
        let path = dir.join("read-only");
        std::fs::create_dir_all(&path).ok()?;
        if !run(Command::new("mount").args(["-t", "tmpfs", "-o", "ro,size=1m", "tmpfs"]).arg(&path)) {
            println!("nothing can be mounted here (mount -t tmpfs -o ro): this part was not run");
            return None;
        }
        Some(Mount { path })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // The processes that used it are gone; if not, the lazy way unmounts it when they are.
        if !run(Command::new("umount").arg(&self.path)) {
            run(Command::new("umount").arg("-l").arg(&self.path));
        }
    }
}

fn run(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}
