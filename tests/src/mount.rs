//! Small file systems for tests: one that fills up, one that cannot be written to. Needs the right to mount; where there
//! is none, says so.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

/// Then nearly all of it is for the test.
const WITHOUT_JOURNAL: &[&str] = &["-O", "^has_journal"];

pub struct Mount {
    pub path: PathBuf,
}

impl Mount {
    /// An ext4 file system of this size in a file of its own; `None`, and a line that says why, where that cannot be.
    pub fn ext4(dir: &Path, mib: u64) -> Option<Mount> {
        let (image, path) = (dir.join("disk.img"), dir.join("disk"));
        let made =
            make_image(&image, mib, WITHOUT_JOURNAL).is_some().then(|| mount_image(&image, path)).flatten();
        if made.is_none() {
            println!(
                "no small file system could be made here (mkfs.ext4, mount -o loop): this part was not run"
            );
        }
        made
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

/// What the file system on a failing disk believes to have.
const IMAGE_MIB: u64 = 256;
/// Of the memory below it, while nothing is to fail.
const LARGE: &str = "size=1024m";

/// Its journal commits when somebody syncs, who then hears of a failure. A commit by the clock would find it and tell nobody:
/// ext4 then reports the next sync of a file as good.
const UPPER: &str = "loop,commit=600";

/// An ext4 file system whose syncs fail with EIO from some point on, as those of a disk do that loses what is in its cache:
/// writes go through, and what the sync was to make safe is gone.
///
/// It lies in a file of another ext4, and that one in a file on a tmpfs that is much smaller than both think. The lower
/// ext4 takes everything into the page cache and finds only when it is synced that there is no room; to the upper one that
/// is a device whose flush fails.
pub struct FailingDisk {
    // Unmounted in this order.
    upper: Option<Mount>,
    lower: Option<Mount>,
    memory: Mount,
}

impl FailingDisk {
    /// Mounted as `data` in `dir`. Syncs begin to fail after about `mib`; `None`, and a line that says why, where nothing can be mounted.
    pub fn new(dir: &Path, mib: u64) -> Option<FailingDisk> {
        let disk = Self::make(dir, mib);
        if disk.is_none() {
            println!(
                "no file system whose syncs fail could be made here (mkfs.ext4, mount -o loop): this part was not run"
            );
        }
        disk
    }

    fn make(dir: &Path, mib: u64) -> Option<FailingDisk> {
        let path = dir.join("memory");
        std::fs::create_dir_all(&path).ok()?;
        if !run(Command::new("mount").args(["-t", "tmpfs", "-o", LARGE, "tmpfs"]).arg(&path)) {
            return None;
        }
        let memory = Mount { path };
        let image = memory.path.join("image");
        make_image(&image, IMAGE_MIB + 64, &["-J", "size=4"])?;
        // All of the upper image has its blocks before the room for them goes: what is lost later is content, never the
        // lower file system's own tables, of which its kernel would not say so.
        {
            let lower = mount_image(&image, dir.join("lower"))?;
            let mut file = std::fs::File::create(lower.path.join("image")).ok()?;
            std::io::copy(&mut std::io::repeat(0).take(IMAGE_MIB << 20), &mut file).ok()?;
            file.sync_all().ok()?;
        }
        if !run(Command::new("fallocate").arg("--dig-holes").arg(&image)) {
            return None;
        }
        let lower = mount_image(&image, dir.join("lower"))?;
        // Its own names and tables outlive such a disk by their journal.
        let few = ["-J", "size=4", "-N", "4096", "-E", "nodiscard,lazy_itable_init=0", "-b", "4096"];
        mkfs(&lower.path.join("image"), &few)?;
        let upper = mount_image_with(&lower.path.join("image"), dir.join("data"), UPPER)?;
        // A data directory is empty at first.
        std::fs::remove_dir(upper.path.join("lost+found")).ok()?;
        let disk = FailingDisk { upper: Some(upper), lower: Some(lower), memory };
        disk.resize(&format!("size={mib}m")).ok()?;
        Some(disk)
    }

    fn resize(&self, size: &str) -> anyhow::Result<()> {
        let options = format!("remount,{size}");
        anyhow::ensure!(
            run(Command::new("mount").args(["-o", &options]).arg(&self.memory.path)),
            "no {size}"
        );
        Ok(())
    }

    pub fn path(&self) -> &Path {
        self.upper.as_ref().map_or(&self.memory.path, |upper| &upper.path)
    }

    /// From now on syncs work. What the caches have and the disk has not is forgotten, as with the power.
    pub fn repair(&mut self) -> anyhow::Result<()> {
        self.resize("size=2048m")?;
        let (upper, lower) = (self.upper.take(), self.lower.take());
        let (Some(upper), Some(lower)) = (upper, lower) else { anyhow::bail!("not mounted") };
        let paths = (upper.path.clone(), lower.path.clone());
        drop(upper);
        drop(lower);
        let lower =
            mount_image(&self.memory.path.join("image"), paths.1).context("the lower file system is lost")?;
        self.upper = mount_image_with(&lower.path.join("image"), paths.0, UPPER);
        self.lower = Some(lower);
        self.upper.as_ref().map(drop).context("the upper file system is lost")
    }
}

/// An empty ext4 in a sparse file.
fn make_image(image: &Path, mib: u64, options: &[&str]) -> Option<()> {
    let file = std::fs::File::create(image).ok()?;
    file.set_len(mib << 20).ok()?;
    mkfs(image, options)
}

fn mkfs(image: &Path, options: &[&str]) -> Option<()> {
    run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).args(options).arg(image)).then_some(())
}

fn mount_image(image: &Path, path: PathBuf) -> Option<Mount> {
    mount_image_with(image, path, "loop")
}

fn mount_image_with(image: &Path, path: PathBuf, options: &str) -> Option<Mount> {
    std::fs::create_dir_all(&path).ok()?;
    run(Command::new("mount").args(["-o", options]).arg(image).arg(&path)).then_some(Mount { path })
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
