//! The little of SQL that the HTTP front must understand.
//!
//! Pure. ClickHouse reads an INSERT and its data from one stream; libchdb takes them apart (and its text entry point
//! takes an empty line in the data for the end of the statement, so data must never go through it). So the head of an
//! INSERT is found here: everything before FORMAT or VALUES, and where the data starts. Everything else about the
//! statement is left to the engine's own parser.
#![forbid(unsafe_code)]

use std::borrow::Cow;

/// What a request's text is, as far as we need to know.
#[derive(Debug, PartialEq, Eq)]
pub enum Shape<'a> {
    /// `INSERT ... FORMAT name` or `... VALUES`: `head` has neither; the data starts at `data_at` of the text.
    Insert { head: &'a [u8], format: &'a str, data_at: usize },
    /// An INSERT whose head does not say where the data starts: more text must follow.
    InsertOpen,
    /// `INSERT ... SELECT ... FORMAT name <data>`, which reads data through `input()`.
    InsertFromInput,
    /// Anything else; it goes to the engine whole.
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Word,
    Quoted,
    Other(u8),
}

/// Splits SQL into tokens; comments and spaces are skipped. Bytes above 0x7f count as letters.
struct Tokens<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Tokens<'a> {
    fn new(text: &'a [u8]) -> Tokens<'a> {
        Tokens { text, at: 0 }
    }

    fn skip_blank(&mut self) {
        loop {
            let rest = &self.text[self.at..];
            if rest.first().is_some_and(|b| b.is_ascii_whitespace() || *b == 0x0b) {
                self.at += 1;
            } else if rest.starts_with(b"--") || rest.starts_with(b"#!") || rest.starts_with(b"# ") {
                self.at += rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
            } else if rest.starts_with(b"/*") {
                let end = rest[2..].windows(2).position(|w| w == b"*/").map(|p| p + 4);
                self.at += end.unwrap_or(rest.len());
            } else {
                return;
            }
        }
    }

    fn next(&mut self) -> Option<(Token, usize, usize)> {
        self.skip_blank();
        let from = self.at;
        let first = *self.text.get(from)?;
        let is_word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_' || *b >= 0x80;
        let token = match first {
            b'\'' | b'"' | b'`' => {
                self.at += 1;
                while let Some(b) = self.text.get(self.at) {
                    self.at += 1;
                    if *b == b'\\' {
                        self.at += 1;
                    } else if *b == first {
                        if self.text.get(self.at) != Some(&first) {
                            break;
                        }
                        self.at += 1;
                    }
                }
                self.at = self.at.min(self.text.len());
                if first == b'\'' { Token::Other(b'\'') } else { Token::Quoted }
            }
            b'$' => {
                // Here-document: $tag$ ... $tag$.
                let rest = &self.text[from..];
                let tag =
                    rest[1..].iter().position(|b| !is_word(b)).filter(|p| rest.get(p + 1) == Some(&b'$'));
                let len = tag.and_then(|p| {
                    let mark = &rest[..p + 2];
                    let end = rest[p + 2..].windows(mark.len()).position(|w| w == mark)?;
                    Some(p + 2 + end + mark.len())
                });
                self.at += len.unwrap_or(1);
                Token::Other(b'\'')
            }
            b if is_word(&b) => {
                let rest = &self.text[from..];
                self.at += rest.iter().position(|b| !is_word(b)).unwrap_or(rest.len());
                Token::Word
            }
            b => {
                self.at += 1;
                Token::Other(b)
            }
        };
        Some((token, from, self.at))
    }
}

/// Where the data starts after a FORMAT name or VALUES: blanks up to and including one line break belong to the
/// statement, as in ClickHouse.
fn data_start(text: &[u8], mut at: usize) -> usize {
    while text.get(at).is_some_and(|b| matches!(b, b' ' | b'\t' | 0x0c)) {
        at += 1;
    }
    if text.get(at) == Some(&b'\r') {
        at += 1;
    }
    if text.get(at) == Some(&b'\n') {
        at += 1;
    }
    at
}

/// Finds out what the text is; looks no further than the start of the data.
pub fn shape(text: &[u8]) -> Shape<'_> {
    let mut tokens = Tokens::new(text);
    let is = |from: usize, to: usize, word: &str| text[from..to].eq_ignore_ascii_case(word.as_bytes());
    match tokens.next() {
        Some((Token::Word, from, to)) if is(from, to, "INSERT") => {}
        _ => return Shape::Other,
    }
    let mut depth = 0i32;
    // After these a name stands, even one that reads like a keyword.
    let mut name_next = false;
    let mut open_paren = false;
    let mut selects = false;
    while let Some((token, from, to)) = tokens.next() {
        let after_paren = std::mem::replace(&mut open_paren, false);
        match token {
            Token::Other(b'(') => {
                depth += 1;
                open_paren = true;
                name_next = false;
            }
            Token::Other(b')') => depth -= 1,
            Token::Other(b'.') => name_next = true,
            Token::Other(b';') if depth == 0 => {
                return if selects { Shape::Other } else { Shape::InsertOpen };
            }
            Token::Word if name_next => {
                // INTO may be followed by TABLE or FUNCTION, after which the name still comes.
                name_next = is(from, to, "TABLE") || is(from, to, "FUNCTION");
            }
            Token::Word if depth == 0 && is(from, to, "FORMAT") => {
                let head_end = from;
                let Some((Token::Word, name_from, name_to)) = tokens.next() else {
                    return Shape::InsertOpen;
                };
                let format = std::str::from_utf8(&text[name_from..name_to]).unwrap_or("");
                let data_at = data_start(text, name_to);
                if !selects {
                    return Shape::Insert { head: &text[..head_end], format, data_at };
                }
                let mut rest = Tokens { text, at: data_at };
                return match rest.next() {
                    None | Some((Token::Other(b';'), ..)) => Shape::Other,
                    Some((Token::Word, f, t)) if is(f, t, "SETTINGS") => Shape::Other,
                    Some(_) => Shape::InsertFromInput,
                };
            }
            Token::Word if depth == 0 && !selects && is(from, to, "VALUES") => {
                return Shape::Insert {
                    head: &text[..from],
                    format: "Values",
                    data_at: data_start(text, to),
                };
            }
            Token::Word if is(from, to, "INTO") && depth == 0 => name_next = true,
            Token::Word
                if depth == 0
                    && (is(from, to, "SELECT") || is(from, to, "WITH") || is(from, to, "WATCH")) =>
            {
                selects = true;
            }
            // INSERT ... FROM INFILE reads on the engine's side: nothing follows.
            Token::Word if depth == 0 && is(from, to, "FROM") => selects = true,
            Token::Word if after_paren && depth == 1 && (is(from, to, "SELECT") || is(from, to, "WITH")) => {
                selects = true;
            }
            _ => name_next = false,
        }
    }
    if selects { Shape::Other } else { Shape::InsertOpen }
}

/// The format that the statement itself asks its result in, if any: the last `FORMAT name` at its end.
pub fn output_format(text: &[u8]) -> Option<&str> {
    let mut tokens = Tokens::new(text);
    let mut found = None;
    let mut depth = 0i32;
    let mut after_format = false;
    while let Some((token, from, to)) = tokens.next() {
        let word = &text[from..to];
        match token {
            Token::Other(b'(') => depth += 1,
            Token::Other(b')') => depth -= 1,
            _ => {}
        }
        if after_format && token == Token::Word {
            found = std::str::from_utf8(word).ok();
            after_format = false;
            continue;
        }
        // A result format stands last; only SETTINGS may follow it.
        if found.is_some() && token != Token::Other(b';') {
            if token == Token::Word && word.eq_ignore_ascii_case(b"SETTINGS") {
                return found;
            }
            found = None;
        }
        after_format = depth == 0 && token == Token::Word && word.eq_ignore_ascii_case(b"FORMAT");
    }
    found
}

/// The engine gives every query an id of its own, and the client's id travels in the setting `log_comment`. So that
/// clients find their queries, a `FROM system.processes` (or JOIN) reads the client's id as `query_id`.
pub fn with_client_query_ids(text: &[u8]) -> Cow<'_, [u8]> {
    const VIEW: &[u8] = b"(SELECT * REPLACE (if(startsWith(Settings['log_comment'], 'query_id='), \
substring(Settings['log_comment'], 10), query_id) AS query_id) FROM system.processes)";
    if !text.windows(9).any(|w| w == b"processes") {
        return Cow::Borrowed(text);
    }
    let mut tokens = Tokens::new(text);
    let mut seen: [(Token, usize, usize); 3] = [(Token::Other(0), 0, 0); 3];
    let mut out = Vec::new();
    let mut copied = 0;
    while let Some(token) = tokens.next() {
        let word = |t: &(Token, usize, usize)| {
            let raw = &text[t.1..t.2];
            match t.0 {
                Token::Word => raw,
                Token::Quoted => raw.get(1..raw.len().saturating_sub(1)).unwrap_or(raw),
                Token::Other(_) => &[],
            }
        };
        let source = &seen[0];
        let is_source = source.0 == Token::Word
            && [b"FROM".as_slice(), b"JOIN"].iter().any(|k| text[source.1..source.2].eq_ignore_ascii_case(k));
        if is_source
            && word(&seen[1]) == b"system"
            && seen[2].0 == Token::Other(b'.')
            && word(&token) == b"processes"
        {
            out.extend_from_slice(&text[copied..seen[1].1]);
            out.extend_from_slice(VIEW);
            copied = token.2;
        }
        seen = [seen[1], seen[2], token];
    }
    if copied == 0 {
        return Cow::Borrowed(text);
    }
    out.extend_from_slice(&text[copied..]);
    Cow::Owned(out)
}

/// A string literal of SQL.
pub fn quote(value: &str) -> String {
    let mut out = String::with_capacity(value.len() + 2);
    out.push('\'');
    for c in value.chars() {
        match c {
            '\'' => out.push_str("\\'"),
            '\\' => out.push_str("\\\\"),
            '\0' => out.push_str("\\0"),
            c => out.push(c),
        }
    }
    out.push('\'');
    out
}

/// An identifier of SQL.
pub fn quote_identifier(name: &str) -> String {
    format!("`{}`", name.replace('\\', "\\\\").replace('`', "\\`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(text: &str) -> (&str, &str, &str) {
        match shape(text.as_bytes()) {
            Shape::Insert { head, format, data_at } => {
                (std::str::from_utf8(head).expect("ascii"), format, &text[data_at..])
            }
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn heads_of_inserts() {
        assert_eq!(insert("INSERT INTO t FORMAT Native\n\n\n;"), ("INSERT INTO t ", "Native", "\n\n;"));
        assert_eq!(
            insert("insert into t(a, b) values (1, 2);"),
            ("insert into t(a, b) ", "Values", "(1, 2);")
        );
        assert_eq!(
            insert(
                "-- c\nINSERT /* FORMAT x */ INTO `FORMAT`.\"values\" SETTINGS a='FORMAT CSV' FORMAT TSV \r\nx"
            ),
            ("-- c\nINSERT /* FORMAT x */ INTO `FORMAT`.\"values\" SETTINGS a='FORMAT CSV' ", "TSV", "x")
        );
        assert_eq!(insert("INSERT INTO format.values FORMAT CSV\n1").2, "1");
        assert_eq!(insert("INSERT INTO TABLE values FORMAT CSV\n1").0, "INSERT INTO TABLE values ");
        assert_eq!(insert("INSERT INTO FUNCTION null('a FORMAT') FORMAT CSV\n1").2, "1");
        assert_eq!(insert("INSERT INTO t FORMAT JSONEachRow {\"a\":1}").2, "{\"a\":1}");
        assert_eq!(insert("INSERT INTO t (* EXCEPT(b)) Values (1)").2, "(1)");
    }

    #[test]
    fn what_has_no_data() {
        for text in [
            "SELECT 1 FORMAT Native",
            "",
            "  ",
            "/* open",
            "INSERT INTO t SELECT 1",
            "INSERT INTO t (a) (SELECT 'VALUES')",
            "INSERT INTO t WITH x AS (SELECT 1) SELECT * FROM x FORMAT Null",
            "INSERT INTO t SELECT * FROM values('a Int8', 1) ;",
            "INSERT INTO t FROM INFILE 'x' FORMAT CSV",
            "EXPLAIN INSERT INTO t VALUES (1)",
        ] {
            assert_eq!(shape(text.as_bytes()), Shape::Other, "{text}");
        }
        assert_eq!(
            shape(b"INSERT INTO t SELECT * FROM input('a Int8') FORMAT CSV\n1"),
            Shape::InsertFromInput
        );
        for text in [
            "INSERT INTO t",
            "INSERT INTO t (a)",
            "INSERT INTO t FORMAT",
            "INSERT",
            "INSERT INTO t 'x",
            "INSERT INTO t;",
        ] {
            assert_eq!(shape(text.as_bytes()), Shape::InsertOpen, "{text}");
        }
    }

    #[test]
    fn no_bytes_panic() {
        let alphabet = b"INSERT VALUES FORMAT$'\"`\\/*-#(); \n\xff.a";
        for seed in 0..20_000u64 {
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            let mut text =
                if seed % 2 == 0 { b"INSERT INTO ".to_vec() } else { b"FROM system.processes".to_vec() };
            for _ in 0..seed % 40 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                text.push(alphabet[(state % alphabet.len() as u64) as usize]);
            }
            let _ = (shape(&text), output_format(&text), with_client_query_ids(&text));
        }
    }

    #[test]
    fn formats_of_results() {
        assert_eq!(output_format(b"SELECT 1 FORMAT JSON;"), Some("JSON"));
        assert_eq!(output_format(b"SELECT format FROM (SELECT 1 FORMAT CSV)"), None);
        assert_eq!(output_format(b"SELECT 1 FORMAT CSV SETTINGS max_threads=1"), Some("CSV"));
        assert_eq!(output_format(b"SELECT 'FORMAT JSON'"), None);
    }

    #[test]
    fn processes_show_the_ids_of_clients() {
        let read =
            |t: &str| String::from_utf8(with_client_query_ids(t.as_bytes()).into_owned()).expect("utf-8");
        assert!(read("SELECT 1 FROM system.processes WHERE 1").contains("FROM (SELECT * REPLACE"));
        assert!(read("select 1 from `system`.processes p").ends_with(" p"));
        for same in ["SELECT 'FROM system.processes'", "DESCRIBE system.processes", "SELECT processes"] {
            assert_eq!(read(same), same);
        }
    }

    #[test]
    fn quotes() {
        assert_eq!(quote("a'b\\"), "'a\\'b\\\\'");
        assert_eq!(quote_identifier("a`b"), "`a\\`b`");
    }
}
