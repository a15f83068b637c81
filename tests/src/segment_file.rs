//! Files of segments, as disks and people ruin them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use flumen_protocol::record_batch;

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

/// Another bit in the batch in the middle, which only its checksum tells of.
pub fn flip_a_bit(segment: &Path) {
    let (file, _) = open(segment);
    let bytes = std::fs::read(segment).unwrap();
    let mut ends = vec![0];
    // Zeros are room that was taken in advance.
    while bytes.get(ends[ends.len() - 1] + 8..).is_some_and(|rest| rest.len() > 4 && rest[..4] != [0; 4]) {
        let at = ends[ends.len() - 1];
        ends.push(at + record_batch::parse_header(&bytes[at..]).unwrap().total_bytes());
    }
    let last = ends[ends.len() / 2] - 1;
    file.write_all_at(&[bytes[last] ^ 1], last as u64).unwrap();
}

/// Writes nonsense over the first batch, as a disk may.
pub fn ruin_first_batch(segment: &Path) {
    let (file, _) = open(segment);
    file.write_all_at(&[0xa5; 200], 0).unwrap();
}

/// As `ruin_first_batch`, in this segment and all behind it but the one that is still written to.
pub fn ruin_all_but_the_last(first: &Path) {
    let is_log = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "log");
    let entries = std::fs::read_dir(first.parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
    let mut segments: Vec<PathBuf> = entries.filter(is_log).collect();
    segments.sort();
    segments.pop();
    assert!(!segments.is_empty(), "there is one segment");
    segments.iter().for_each(|segment| ruin_first_batch(segment));
}
