//! The newest offset of every key that one pass of compaction has met. Pure, and bounded: keys are held as hashes of 128
//! bits, so that two of them meet about as often as memory flips a bit unnoticed.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher, Hasher};

/// Keys of one pass, 25 bytes each: 26 MiB in a table of 2^20 places. More keys take more passes.
pub const KEYS_MAX: usize = (1 << 20) / 8 * 7;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyHash([u64; 2]);

impl KeyHash {
    /// `seed` differs from pass to pass, so that nobody can prepare keys that meet.
    pub fn of(seed: u64, key: &[u8]) -> Self {
        let half = |which: u64| {
            let mut hasher = DefaultHasher::new();
            hasher.write_u64(seed ^ which);
            hasher.write(key);
            hasher.finish()
        };
        Self([half(0), half(u64::MAX)])
    }
}

/// The key is a hash already.
#[derive(Debug, Clone, Copy, Default)]
pub struct Halves(u64);

impl Hasher for Halves {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {}

    fn write_u64(&mut self, half: u64) {
        self.0 ^= half;
    }

    fn write_usize(&mut self, _: usize) {}
}

#[derive(Debug, Default)]
pub struct OffsetMap {
    offsets: HashMap<KeyHash, i64, BuildHasherDefault<Halves>>,
}

impl OffsetMap {
    pub fn len(&self) -> usize {
        self.offsets.len()
    }

    /// A record with this key stands at `offset`; the highest counts.
    pub fn put(&mut self, key: KeyHash, offset: i64) {
        let newest = self.offsets.entry(key).or_insert(offset);
        *newest = offset.max(*newest);
    }

    pub fn get(&self, key: KeyHash) -> Option<i64> {
        self.offsets.get(&key).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_offset_of_a_key_counts() {
        let mut map = OffsetMap::default();
        let key = |k: u32| KeyHash::of(7, &k.to_be_bytes());
        for offset in 0..100_000u32 {
            map.put(key(offset % 1000), i64::from(offset));
        }
        map.put(key(3), 5);
        assert_eq!(map.len(), 1000);
        assert_eq!(
            (map.get(key(0)), map.get(key(3)), map.get(key(1000))),
            (Some(99_000), Some(99_003), None)
        );
        assert_ne!(KeyHash::of(1, b"a"), KeyHash::of(2, b"a"));
        assert_ne!(KeyHash::of(1, b""), KeyHash::of(1, b"\0"));
    }
}
