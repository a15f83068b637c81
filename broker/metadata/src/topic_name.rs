//! Which topic names Kafka allows, which collide, and which are internal.

/// Committed offsets and group state, in Kafka's own record format.
pub const OFFSETS_TOPIC: &str = "__consumer_offsets";
pub const TRANSACTION_TOPIC: &str = "__transaction_state";
/// The metadata log; it is no topic of the image, and no client may make one of its name.
pub const METADATA_TOPIC: &str = "__cluster_metadata";

/// Kafka's limit: a directory name has room for `-<partition>` and a suffix behind it.
pub const NAME_BYTES_MAX: usize = 249;

pub fn is_internal(name: &str) -> bool {
    name == OFFSETS_TOPIC || name == TRANSACTION_TOPIC
}

/// Why a name is not allowed.
pub fn check(name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err("Topic name is invalid: the empty string is not allowed".into());
    }
    if name == "." || name == ".." {
        return Err(format!("Topic name is invalid: '{name}' is not allowed"));
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(format!("Topic name is invalid: it is longer than {NAME_BYTES_MAX} characters"));
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match name.chars().find(|c| !allowed(*c)) {
        None => Ok(()),
        Some(bad) => Err(format!(
            "Topic name is invalid: '{name}' contains '{}'; allowed are ASCII letters and digits, '.', '_' and '-'",
            bad.escape_default()
        )),
    }
}

/// Metric names replace `.` by `_`, so two names that differ only there cannot live together.
pub fn collides(a: &str, b: &str) -> bool {
    let unify = |byte: u8| if byte == b'.' { b'_' } else { byte };
    a != b && a.len() == b.len() && a.bytes().map(unify).eq(b.bytes().map(unify))
}

/// A name of `existing` that `name` collides with.
pub fn collision<'a>(name: &str, existing: impl IntoIterator<Item = &'a String>) -> Option<&'a str> {
    // Without either character nothing can collide, and no name needs to be looked at.
    if !name.contains(['.', '_']) {
        return None;
    }
    existing.into_iter().map(String::as_str).find(|other| collides(name, other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "A-b_c.9", "__consumer_offsets", &"x".repeat(249)] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "..", "a b", "a/b", "ä", "a\0", &"x".repeat(250)] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        assert!(collides("a.b", "a_b") && !collides("a.b", "a.b") && !collides("a.b", "a-b"));
        let existing = ["a_b".to_string(), "plain".to_string()];
        assert_eq!(collision("a.b", &existing), Some("a_b"));
        assert_eq!(collision("plain", &existing), None);
    }
}
