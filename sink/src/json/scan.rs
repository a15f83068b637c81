//! JSON syntax, in one pass over text that is known to be UTF-8.
//!
//! Owns the grammar of RFC 8259 and nothing else: where a value ends, whether a string holds escapes. Pure, any thread.
//! Invariants: what it accepts is what serde_json accepts (a property test says so), except that it does not look at
//! whether `\u` escapes pair up, as serde_json does not for values it skips; the stack does not grow with nesting; no
//! byte is looked at twice, but for the few of a token's first word. It decodes nothing.

/// Why the text is not JSON. Positions are bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SyntaxError {
    /// The text ends inside a value.
    End,
    At(usize),
}

/// A value as it stands in the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value<'a> {
    /// With its quotes, and with escapes still in it if `escaped`.
    Str { quoted: &'a str, escaped: bool },
    /// A number, literal, object or array.
    Raw(&'a str),
}

impl<'a> Value<'a> {
    /// A value from its raw text, which is known to be one value.
    pub(crate) fn of_raw(raw: &'a str) -> Value<'a> {
        match raw.as_bytes() {
            [b'"', inner @ .., b'"'] => Value::Str { quoted: raw, escaped: inner.contains(&b'\\') },
            _ => Value::Raw(raw),
        }
    }

    pub(crate) fn first_byte(self) -> u8 {
        match self {
            Value::Str { .. } => b'"',
            Value::Raw(raw) => raw.as_bytes().first().copied().unwrap_or(0),
        }
    }
}

pub(crate) struct Scanner<'a> {
    text: &'a str,
    at: usize,
}

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGHS: u64 = 0x8080_8080_8080_8080;

/// Marks (0x80) the bytes of a word that end or change a string: quote, backslash, control characters. Marks above the
/// first one may be wrong, the first never is.
fn special(word: u64) -> u64 {
    let has_less = |n: u64| word.wrapping_sub(ONES * n) & !word;
    let has_zero = |x: u64| x.wrapping_sub(ONES) & !x;
    let quote = has_zero(word ^ (ONES * u64::from(b'"')));
    let backslash = has_zero(word ^ (ONES * u64::from(b'\\')));
    (has_less(0x20) | quote | backslash) & HIGHS
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(text: &'a str) -> Scanner<'a> {
        Scanner { text, at: 0 }
    }

    fn bytes(&self) -> &'a [u8] {
        self.text.as_bytes()
    }

    fn slice(&self, from: usize, to: usize) -> &'a str {
        // Both ends are at ASCII bytes, so this never falls back.
        self.text.get(from..to).unwrap_or_default()
    }

    /// The next byte that is not white space, without taking it.
    pub(crate) fn peek(&mut self) -> Option<u8> {
        loop {
            match self.bytes().get(self.at) {
                Some(b' ' | b'\n' | b'\t' | b'\r') => self.at += 1,
                other => return other.copied(),
            }
        }
    }

    fn wrong<T>(&self) -> Result<T, SyntaxError> {
        match self.bytes().get(self.at) {
            Some(_) => Err(SyntaxError::At(self.at)),
            None => Err(SyntaxError::End),
        }
    }

    /// Takes this byte, after white space.
    pub(crate) fn expect(&mut self, byte: u8) -> Result<(), SyntaxError> {
        if self.peek() == Some(byte) {
            self.at += 1;
            return Ok(());
        }
        self.wrong()
    }

    /// After a member of an object: true if another follows.
    pub(crate) fn more_members(&mut self) -> Result<bool, SyntaxError> {
        match self.peek() {
            Some(c @ (b',' | b'}')) => {
                self.at += 1;
                Ok(c == b',')
            }
            _ => self.wrong(),
        }
    }

    /// Takes `text` if the next bytes are exactly that, as they nearly always are.
    pub(crate) fn take(&mut self, text: &[u8]) -> bool {
        let found = self.bytes().get(self.at..).is_some_and(|rest| rest.starts_with(text));
        self.at += if found { text.len() } else { 0 };
        found
    }

    /// A string, its opening quote not yet taken.
    pub(crate) fn string(&mut self) -> Result<Value<'a>, SyntaxError> {
        self.expect(b'"')?;
        let start = self.at - 1;
        let mut escaped = false;
        loop {
            self.at = end_of_plain(self.bytes(), self.at);
            match self.bytes().get(self.at) {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(Value::Str { quoted: self.slice(start, self.at), escaped });
                }
                Some(b'\\') => {
                    escaped = true;
                    self.at += 1;
                    self.escape()?;
                }
                _ => return self.wrong(),
            }
        }
    }

    /// After a backslash.
    fn escape(&mut self) -> Result<(), SyntaxError> {
        match self.bytes().get(self.at) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.at += 1,
            Some(b'u') => {
                self.at += 1;
                for _ in 0..4 {
                    match self.bytes().get(self.at) {
                        Some(c) if c.is_ascii_hexdigit() => self.at += 1,
                        _ => return self.wrong(),
                    }
                }
            }
            _ => return self.wrong(),
        }
        Ok(())
    }

    /// One value, whole, after white space. `open` is scratch space for nesting.
    pub(crate) fn value(&mut self, open: &mut Vec<u8>) -> Result<Value<'a>, SyntaxError> {
        match self.peek() {
            Some(b'"') => self.string(),
            Some(b'{' | b'[') => {
                let start = self.at;
                self.container(open)?;
                Ok(Value::Raw(self.slice(start, self.at)))
            }
            _ => {
                let start = self.at;
                self.scalar()?;
                Ok(Value::Raw(self.slice(start, self.at)))
            }
        }
    }

    /// A number or literal.
    fn scalar(&mut self) -> Result<(), SyntaxError> {
        match self.bytes().get(self.at) {
            Some(b'-' | b'0'..=b'9') => self.number(),
            Some(b't') => self.literal(b"true"),
            Some(b'f') => self.literal(b"false"),
            Some(b'n') => self.literal(b"null"),
            _ => self.wrong(),
        }
    }

    fn literal(&mut self, word: &[u8]) -> Result<(), SyntaxError> {
        for expected in word {
            match self.bytes().get(self.at) {
                Some(c) if c == expected => self.at += 1,
                _ => return self.wrong(),
            }
        }
        Ok(())
    }

    fn number(&mut self) -> Result<(), SyntaxError> {
        if self.bytes().get(self.at) == Some(&b'-') {
            self.at += 1;
        }
        match self.bytes().get(self.at) {
            Some(b'0') => {
                self.at += 1;
                // A zero leads no other digit.
                if matches!(self.bytes().get(self.at), Some(b'0'..=b'9')) {
                    return self.wrong();
                }
            }
            Some(b'1'..=b'9') => self.digits(),
            _ => return self.wrong(),
        }
        if self.bytes().get(self.at) == Some(&b'.') {
            self.at += 1;
            self.some_digits()?;
        }
        if matches!(self.bytes().get(self.at), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.bytes().get(self.at), Some(b'-' | b'+')) {
                self.at += 1;
            }
            self.some_digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) {
        while matches!(self.bytes().get(self.at), Some(b'0'..=b'9')) {
            self.at += 1;
        }
    }

    fn some_digits(&mut self) -> Result<(), SyntaxError> {
        if !matches!(self.bytes().get(self.at), Some(b'0'..=b'9')) {
            return self.wrong();
        }
        self.digits();
        Ok(())
    }

    /// An object or array, however deep. `open` holds the closing bytes that are owed, innermost last.
    fn container(&mut self, open: &mut Vec<u8>) -> Result<(), SyntaxError> {
        open.clear();
        loop {
            // Before a value.
            let fresh = match self.peek() {
                Some(b'{') => {
                    self.at += 1;
                    open.push(b'}');
                    true
                }
                Some(b'[') => {
                    self.at += 1;
                    open.push(b']');
                    true
                }
                Some(b'"') => {
                    self.string()?;
                    false
                }
                _ => {
                    self.scalar()?;
                    false
                }
            };
            // After a value, or inside a container that was just opened.
            let mut after_value = !fresh;
            loop {
                let Some(close) = open.last().copied() else { return Ok(()) };
                match self.peek() {
                    Some(c) if c == close => {
                        self.at += 1;
                        open.pop();
                        after_value = true;
                    }
                    Some(b',') if after_value => {
                        self.at += 1;
                        self.key_if_object(close)?;
                        break;
                    }
                    _ if !after_value => {
                        self.key_if_object(close)?;
                        break;
                    }
                    _ => return self.wrong(),
                }
            }
        }
    }

    fn key_if_object(&mut self, close: u8) -> Result<(), SyntaxError> {
        if close == b'}' {
            self.string()?;
            self.expect(b':')?;
        }
        Ok(())
    }

    /// Nothing but white space may follow.
    pub(crate) fn end(&mut self) -> Result<(), SyntaxError> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(SyntaxError::At(self.at)),
        }
    }
}

/// The first byte from `at` on that ends or changes a string, or the end of the text.
fn end_of_plain(bytes: &[u8], mut at: usize) -> usize {
    while let Some(chunk) = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        let marks = special(u64::from_le_bytes(*chunk));
        if marks != 0 {
            return at + (marks.trailing_zeros() / 8) as usize;
        }
        at += 8;
        // Long strings, four words at a time.
        while let Some(chunk) = bytes.get(at..).and_then(|rest| rest.first_chunk::<32>()) {
            let mut found = false;
            for c in chunk {
                found |= *c < 0x20 || *c == b'"' || *c == b'\\';
            }
            if found {
                break;
            }
            at += 32;
        }
    }
    while let Some(c) = bytes.get(at) {
        if *c < 0x20 || *c == b'"' || *c == b'\\' {
            break;
        }
        at += 1;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::de::IgnoredAny;

    /// Whether the text is one JSON value, by this scanner.
    fn accepts(text: &str) -> bool {
        let mut scanner = Scanner::new(text);
        let mut open = Vec::new();
        match scanner.value(&mut open) {
            Ok(_) => scanner.end().is_ok(),
            Err(_) => false,
        }
    }

    fn serde_accepts(text: &str) -> bool {
        serde_json::from_str::<IgnoredAny>(text).is_ok()
    }

    #[test]
    fn where_values_end() {
        let mut scanner = Scanner::new(r#" {"a": [1, {"b": "x\"y"}, -0.5e+3], "c": null} ,7"#);
        let mut open = Vec::new();
        assert_eq!(
            scanner.value(&mut open),
            Ok(Value::Raw(r#"{"a": [1, {"b": "x\"y"}, -0.5e+3], "c": null}"#))
        );
        assert_eq!(scanner.end(), Err(SyntaxError::At(47)));
        let mut scanner = Scanner::new(r#""plain" "with \u00e9 and \\" "#);
        assert_eq!(scanner.value(&mut open), Ok(Value::Str { quoted: "\"plain\"", escaped: false }));
        let quoted = r#""with \u00e9 and \\""#;
        assert_eq!(scanner.value(&mut open), Ok(Value::Str { quoted, escaped: true }));
        assert_eq!(scanner.end(), Ok(()));
        assert_eq!(Value::of_raw(r#""a\nb""#), Value::Str { quoted: r#""a\nb""#, escaped: true });
        assert_eq!(Value::of_raw("12").first_byte(), b'1');
    }

    #[test]
    fn accepts_and_refuses_like_serde() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        for text in [
            "",
            " ",
            "{}",
            "[]",
            "[ ]",
            "{ }",
            "[1]",
            "[1,]",
            "[,1]",
            "[1 2]",
            "{\"a\":1,}",
            "{,}",
            "{\"a\"}",
            "{\"a\":}",
            "{1:2}",
            "{\"a\":1 \"b\":2}",
            "{\"a\":[}]",
            "[}",
            "{]",
            "nul",
            "nulll",
            "true",
            "falsey",
            "tru",
            "0",
            "-0",
            "00",
            "01",
            "-",
            "-01",
            "1.",
            ".5",
            "1.5",
            "1e",
            "1e+",
            "1E-7",
            "+1",
            "1e5.5",
            "0x1",
            "\"",
            "\"a",
            "\"\\",
            "\"\\x\"",
            "\"\\u12\"",
            "\"\\u12g4\"",
            "\"\\ud800\"",
            "\"\u{7f}\"",
            "\"\u{1f}\"",
            "\"\t\"",
            "\"\\/\"",
            "[[[[]]]]",
            "[[[[]]]",
            "{\"a\":{\"b\":{}}}",
            "[1,[2,[3]],{\"x\":[]}]",
            "1 1",
            "[] []",
            "\u{feff}1",
            "\u{a0}1",
            "[\"é\",\"\u{10ffff}\"]",
            "[1}",
            "{\"a\":1]",
            "{\"a\":1}}",
            "[[1],[2]],",
        ] {
            assert_eq!(accepts(text), serde_accepts(text), "{text:?}");
        }
        assert!(accepts(&deep));
        assert!(!accepts(&deep[..deep.len() - 1]));
    }

    #[test]
    fn specials_at_every_place() {
        for length in 0..80 {
            let plain = "é".repeat(length / 2) + &"x".repeat(length % 2);
            assert_eq!(end_of_plain(plain.as_bytes(), 0), plain.len());
            for at in 0..=length {
                for special in ["\"", "\\", "\u{1f}", "\0"] {
                    let text = "~".repeat(at) + special + &"\"".repeat(length - at);
                    assert_eq!(end_of_plain(text.as_bytes(), 0), at, "{text:?}");
                }
            }
        }
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<f64>().prop_map(Into::into),
            ".{0,40}".prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Into::into),
                proptest::collection::vec((".{0,12}", inner), 0..6)
                    .prop_map(|pairs| serde_json::Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn valid_json_is_accepted(value in json(), pretty in any::<bool>()) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            prop_assert!(accepts(&text.unwrap()));
        }

        #[test]
        fn damaged_json_is_judged_as_serde_judges_it(
            value in json(),
            at in any::<prop::sample::Index>(),
            with in "[\\x00-\\x7f]{0,2}",
            cut in any::<bool>(),
        ) {
            let mut text = serde_json::to_string(&value).unwrap();
            let places: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            let at = places[at.index(places.len())];
            if cut {
                text.truncate(at);
            } else {
                let end = at + text[at..].chars().next().map_or(0, char::len_utf8);
                text.replace_range(at..end, &with);
            }
            prop_assert_eq!(accepts(&text), serde_accepts(&text), "{:?}", text);
        }

        #[test]
        fn json_like_text_is_judged_as_serde_judges_it(text in "[\\[\\]{},: \"\\\\0-9eE.tfnu+-]{0,30}") {
            prop_assert_eq!(accepts(&text), serde_accepts(&text), "{:?}", text);
        }
    }
}
