//! CityHash128 as ClickHouse uses it: the function of CityHash 1.0.2, which later releases changed.
//!
//! Owns nothing; pure. It is here only to check and to make the checksum of ClickHouse's compressed blocks
//! (`blocks.rs`); it is not a hash for maps.
#![forbid(unsafe_code)]

const K0: u64 = 0xc3a5_c85c_97cb_3127;
const K1: u64 = 0xb492_b66f_be98_f273;
const K2: u64 = 0x9ae1_6a3b_2f90_404f;
const K3: u64 = 0xc949_d7c7_509e_6557;
const K_MUL: u64 = 0x9ddf_ea08_eb38_2d69;

/// The 16 bytes that stand in front of a block: low half first, both little-endian.
pub fn checksum(data: &[u8]) -> [u8; 16] {
    let (low, high) = cityhash128(data);
    let mut out = [0; 16];
    out[..8].copy_from_slice(&low.to_le_bytes());
    out[8..].copy_from_slice(&high.to_le_bytes());
    out
}

/// (low, high) halves of the hash.
pub fn cityhash128(data: &[u8]) -> (u64, u64) {
    let len = data.len();
    if len >= 16 {
        with_seed(&data[16..], (fetch64(data, 0) ^ K3, fetch64(data, 8)))
    } else if len >= 8 {
        let low = fetch64(data, 0) ^ (len as u64).wrapping_mul(K0);
        with_seed(&[], (low, fetch64(data, len - 8) ^ K1))
    } else {
        with_seed(data, (K0, K1))
    }
}

fn fetch64(data: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&data[at..at + 8]);
    u64::from_le_bytes(word)
}

fn fetch32(data: &[u8], at: usize) -> u64 {
    let mut word = [0; 4];
    word.copy_from_slice(&data[at..at + 4]);
    u64::from(u32::from_le_bytes(word))
}

fn shift_mix(value: u64) -> u64 {
    value ^ (value >> 47)
}

fn hash16(low: u64, high: u64) -> u64 {
    let a = shift_mix((low ^ high).wrapping_mul(K_MUL));
    let b = shift_mix((high ^ a).wrapping_mul(K_MUL));
    b.wrapping_mul(K_MUL)
}

fn hash_0_to_16(data: &[u8]) -> u64 {
    let len = data.len();
    if len > 8 {
        let (a, b) = (fetch64(data, 0), fetch64(data, len - 8));
        hash16(a, b.wrapping_add(len as u64).rotate_right(len as u32)) ^ b
    } else if len >= 4 {
        hash16((len as u64).wrapping_add(fetch32(data, 0) << 3), fetch32(data, len - 4))
    } else if len > 0 {
        let y = u64::from(data[0]) + (u64::from(data[len >> 1]) << 8);
        let z = len as u64 + (u64::from(data[len - 1]) << 2);
        shift_mix(y.wrapping_mul(K2) ^ z.wrapping_mul(K3)).wrapping_mul(K2)
    } else {
        K2
    }
}

/// Mixes the 32 bytes at `at` into the pair (a, b).
fn weak32(data: &[u8], at: usize, a: u64, b: u64) -> (u64, u64) {
    let (w, x) = (fetch64(data, at), fetch64(data, at + 8));
    let (y, z) = (fetch64(data, at + 16), fetch64(data, at + 24));
    let a = a.wrapping_add(w);
    let b = b.wrapping_add(a).wrapping_add(z).rotate_right(21);
    let c = a;
    let a = a.wrapping_add(x).wrapping_add(y);
    let b = b.wrapping_add(a.rotate_right(44));
    (a.wrapping_add(z), b.wrapping_add(c))
}

fn murmur(data: &[u8], seed: (u64, u64)) -> (u64, u64) {
    let len = data.len();
    let (mut a, mut b) = seed;
    let mut c;
    let mut d;
    if len <= 16 {
        a = shift_mix(a.wrapping_mul(K1)).wrapping_mul(K1);
        c = b.wrapping_mul(K1).wrapping_add(hash_0_to_16(data));
        d = shift_mix(a.wrapping_add(if len >= 8 { fetch64(data, 0) } else { c }));
    } else {
        c = hash16(fetch64(data, len - 8).wrapping_add(K1), a);
        d = hash16(b.wrapping_add(len as u64), c.wrapping_add(fetch64(data, len - 16)));
        a = a.wrapping_add(d);
        let mut at = 0;
        while at + 16 < len {
            a ^= shift_mix(fetch64(data, at).wrapping_mul(K1)).wrapping_mul(K1);
            a = a.wrapping_mul(K1);
            b ^= a;
            c ^= shift_mix(fetch64(data, at + 8).wrapping_mul(K1)).wrapping_mul(K1);
            c = c.wrapping_mul(K1);
            d ^= c;
            at += 16;
        }
    }
    let a = hash16(a, c);
    let b = hash16(d, b);
    (a ^ b, hash16(b, a))
}

fn with_seed(data: &[u8], seed: (u64, u64)) -> (u64, u64) {
    if data.len() < 128 {
        return murmur(data, seed);
    }
    let (mut x, mut y) = seed;
    let mut z = (data.len() as u64).wrapping_mul(K1);
    let mut v = (0, 0);
    v.0 = (y ^ K1).rotate_right(49).wrapping_mul(K1).wrapping_add(fetch64(data, 0));
    v.1 = v.0.rotate_right(42).wrapping_mul(K1).wrapping_add(fetch64(data, 8));
    let mut w = (
        y.wrapping_add(z).rotate_right(35).wrapping_mul(K1).wrapping_add(x),
        x.wrapping_add(fetch64(data, 88)).rotate_right(53).wrapping_mul(K1),
    );
    let mut at = 0;
    while data.len() - at >= 128 {
        for _ in 0..2 {
            x = x.wrapping_add(y).wrapping_add(v.0).wrapping_add(fetch64(data, at + 16));
            x = x.rotate_right(37).wrapping_mul(K1);
            y = y.wrapping_add(v.1).wrapping_add(fetch64(data, at + 48)).rotate_right(42).wrapping_mul(K1);
            x ^= w.1;
            y ^= v.0;
            z = (z ^ w.0).rotate_right(33);
            v = weak32(data, at, v.1.wrapping_mul(K1), x.wrapping_add(w.0));
            w = weak32(data, at + 32, z.wrapping_add(w.1), y);
            std::mem::swap(&mut z, &mut x);
            at += 64;
        }
    }
    y = y.wrapping_add(w.0.rotate_right(37).wrapping_mul(K0)).wrapping_add(z);
    x = x.wrapping_add(v.0.wrapping_add(z).rotate_right(49).wrapping_mul(K0));
    // The tail is taken in 32-byte steps from the end; the last step may reach back before `at`, which is within
    // the data because at least 128 bytes were there.
    let rest = data.len() - at;
    let mut done = 0;
    while done < rest {
        done += 32;
        let from = data.len() - done;
        y = y.wrapping_sub(x).rotate_right(42).wrapping_mul(K0).wrapping_add(v.1);
        w.0 = w.0.wrapping_add(fetch64(data, from + 16));
        x = x.rotate_right(49).wrapping_mul(K0).wrapping_add(w.0);
        w.0 = w.0.wrapping_add(v.0);
        v = weak32(data, from, v.0, v.1);
    }
    x = hash16(x, v.0);
    y = hash16(y, w.0);
    (hash16(x.wrapping_add(v.1), w.1).wrapping_add(y), hash16(x.wrapping_add(w.1), y.wrapping_add(v.1)))
}
