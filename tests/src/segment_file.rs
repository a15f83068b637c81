//! Files of segments, as disks and people ruin them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The first segment of `topic-partition` in a data directory.
pub fn first_of(data: &Path, partition: &str) -> PathBuf {
    let inside = |dir: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let named = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with(&format!("{partition}.")) && !name.ends_with(".deleted")
    };
    let dir = inside(&data.join("log")).into_iter().find(named).expect("a directory of the partition");
    let is_log = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "log");
    let segments = inside(&dir).into_iter().filter(is_log);
    segments.min().expect("a segment")
}

fn open(segment: &Path) -> (File, u64) {
    let file = OpenOptions::new().write(true).open(segment).unwrap();
    let length = file.metadata().unwrap().len();
    assert!(length > 1000, "{} has {length} bytes", segment.display());
    (file, length)
}

/// Takes away the second half, as a file system that was mended might.
pub fn cut_in_half(segment: &Path) {
    let (file, length) = open(segment);
    file.set_len(length / 2).unwrap();
}

/// Writes nonsense over the first batch, as a disk may.
pub fn ruin_first_batch(segment: &Path) {
    let (file, _) = open(segment);
    file.write_all_at(&[0xa5; 200], 0).unwrap();
}
