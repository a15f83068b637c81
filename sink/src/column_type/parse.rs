//! The parser of column types. Owns the grammar; recursion is bounded by `MAX_TYPE_DEPTH`. It does not print.

use super::{ColumnType, MAX_DECIMAL_PRECISION, MAX_FIXED_STRING, MAX_TYPE_DEPTH, TypeError};

pub(super) fn parse(text: &str) -> Result<ColumnType, TypeError> {
    let mut parser = Parser { text: text.as_bytes(), at: 0 };
    let ty = parser.ty(0)?;
    parser.skip_space();
    if parser.at != parser.text.len() {
        return Err(parser.malformed("the end of the type"));
    }
    Ok(ty)
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn malformed(&self, expected: &'static str) -> TypeError {
        TypeError::Malformed { at: self.at, expected }
    }

    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    /// Takes `byte` if it comes next, spaces aside.
    fn take(&mut self, byte: u8) -> bool {
        self.skip_space();
        let found = self.peek() == Some(byte);
        if found {
            self.at += 1;
        }
        found
    }

    fn expect(&mut self, byte: u8, expected: &'static str) -> Result<(), TypeError> {
        if self.take(byte) { Ok(()) } else { Err(self.malformed(expected)) }
    }

    fn name(&mut self) -> Result<String, TypeError> {
        self.skip_space();
        let start = self.at;
        while matches!(self.peek(), Some(c) if c.is_ascii_alphanumeric() || c == b'_') {
            self.at += 1;
        }
        if start == self.at {
            return Err(self.malformed("a type name"));
        }
        // ASCII alone was taken, so every byte is a char.
        Ok(self.text.get(start..self.at).unwrap_or_default().iter().map(|b| char::from(*b)).collect())
    }

    fn integer(&mut self) -> Result<i64, TypeError> {
        self.skip_space();
        let start = self.at;
        let negative = self.take(b'-');
        let mut value: i64 = 0;
        let mut digits = 0;
        while let Some(c @ b'0'..=b'9') = self.peek() {
            value = value
                .checked_mul(10)
                .and_then(|v| v.checked_add(i64::from(c - b'0')))
                .ok_or(TypeError::Malformed { at: start, expected: "a smaller number" })?;
            digits += 1;
            self.at += 1;
        }
        if digits == 0 {
            return Err(self.malformed("a number"));
        }
        Ok(if negative { -value } else { value })
    }

    fn quoted(&mut self) -> Result<String, TypeError> {
        self.expect(b'\'', "a quoted string")?;
        let start = self.at;
        let mut bytes = Vec::new();
        loop {
            let c = self.peek().ok_or_else(|| self.malformed("a closing quote"))?;
            self.at += 1;
            match c {
                b'\'' if self.peek() == Some(b'\'') => {
                    self.at += 1;
                    bytes.push(b'\'');
                }
                b'\'' => break,
                b'\\' => {
                    let escaped = self.peek().ok_or_else(|| self.malformed("an escaped character"))?;
                    self.at += 1;
                    bytes.push(match escaped {
                        b'n' => b'\n',
                        b'r' => b'\r',
                        b't' => b'\t',
                        b'0' => 0,
                        b'a' => 7,
                        b'b' => 8,
                        b'v' => 11,
                        b'f' => 12,
                        b'e' => 27,
                        b'x' => {
                            let digit = |b: Option<&u8>| b.and_then(|b| char::from(*b).to_digit(16));
                            match (digit(self.text.get(self.at)), digit(self.text.get(self.at + 1))) {
                                (Some(high), Some(low)) => {
                                    self.at += 2;
                                    (high * 16 + low) as u8
                                }
                                _ => return Err(self.malformed("two hexadecimal digits")),
                            }
                        }
                        other => other,
                    });
                }
                other => bytes.push(other),
            }
        }
        String::from_utf8(bytes).map_err(|_| TypeError::Malformed { at: start, expected: "UTF-8 text" })
    }

    fn ty(&mut self, depth: usize) -> Result<ColumnType, TypeError> {
        if depth >= MAX_TYPE_DEPTH {
            return Err(TypeError::TooDeep);
        }
        let name = self.name()?;
        let ty = match name.as_str() {
            "Int8" => ColumnType::Int8,
            "Int16" => ColumnType::Int16,
            "Int32" => ColumnType::Int32,
            "Int64" => ColumnType::Int64,
            "UInt8" => ColumnType::UInt8,
            "UInt16" => ColumnType::UInt16,
            "UInt32" => ColumnType::UInt32,
            "UInt64" => ColumnType::UInt64,
            "Float32" => ColumnType::Float32,
            "Float64" => ColumnType::Float64,
            "Bool" | "Boolean" => ColumnType::Bool,
            "String" => ColumnType::String,
            "UUID" => ColumnType::Uuid,
            "Date" => ColumnType::Date,
            "Date32" => ColumnType::Date32,
            "FixedString" => {
                self.open()?;
                let len = self.integer()?;
                self.close()?;
                match usize::try_from(len) {
                    Ok(len) if (1..=MAX_FIXED_STRING).contains(&len) => ColumnType::FixedString(len),
                    _ => return Err(invalid("FixedString", "its length must be 1 to 16777215")),
                }
            }
            "DateTime" => {
                let tz = if self.take(b'(') {
                    let tz = self.quoted()?;
                    self.close()?;
                    Some(tz)
                } else {
                    None
                };
                ColumnType::DateTime { tz }
            }
            "DateTime64" => {
                self.open()?;
                let precision = match self.integer()? {
                    p @ 0..=9 => p as u8,
                    _ => return Err(invalid("DateTime64", "its precision must be 0 to 9")),
                };
                let tz = if self.take(b',') { Some(self.quoted()?) } else { None };
                self.close()?;
                ColumnType::DateTime64 { precision, tz }
            }
            "Decimal" => {
                if self.take(b'(') {
                    let precision = self.integer()?;
                    let scale = if self.take(b',') { self.integer()? } else { 0 };
                    self.close()?;
                    decimal(precision, scale)?
                } else {
                    decimal(10, 0)?
                }
            }
            "Decimal32" => self.sized_decimal(9)?,
            "Decimal64" => self.sized_decimal(18)?,
            "Decimal128" => self.sized_decimal(38)?,
            "Enum8" | "Enum16" | "Enum" => self.enumeration(&name)?,
            "LowCardinality" => {
                let inner = self.inner(depth)?;
                if !inner.can_be_low_cardinality() {
                    return Err(invalid("LowCardinality", "this type cannot be inside it"));
                }
                ColumnType::LowCardinality(Box::new(inner))
            }
            "Nullable" => {
                let inner = self.inner(depth)?;
                if !inner.can_be_nullable() {
                    return Err(invalid("Nullable", "this type cannot be inside it"));
                }
                ColumnType::Nullable(Box::new(inner))
            }
            "Array" => ColumnType::Array(Box::new(self.inner(depth)?)),
            "Map" => {
                self.open()?;
                let key = self.ty(depth + 1)?;
                self.expect(b',', "a comma")?;
                let value = self.ty(depth + 1)?;
                self.close()?;
                if !key.can_be_map_key() {
                    return Err(invalid("Map", "this type cannot be a key"));
                }
                ColumnType::Map(Box::new(key), Box::new(value))
            }
            _ => return Err(TypeError::Unsupported { name }),
        };
        Ok(ty)
    }

    fn open(&mut self) -> Result<(), TypeError> {
        self.expect(b'(', "an opening parenthesis")
    }

    fn close(&mut self) -> Result<(), TypeError> {
        self.expect(b')', "a closing parenthesis")
    }

    fn inner(&mut self, depth: usize) -> Result<ColumnType, TypeError> {
        self.open()?;
        let inner = self.ty(depth + 1)?;
        self.close()?;
        Ok(inner)
    }

    fn sized_decimal(&mut self, precision: i64) -> Result<ColumnType, TypeError> {
        self.open()?;
        let scale = self.integer()?;
        self.close()?;
        decimal(precision, scale)
    }

    fn enumeration(&mut self, name: &str) -> Result<ColumnType, TypeError> {
        self.open()?;
        let mut values: Vec<(String, i16)> = Vec::new();
        loop {
            let text = self.quoted()?;
            let value = if self.take(b'=') {
                self.integer()?
            } else {
                // ClickHouse counts on from the value before, starting at 1.
                values.last().map_or(1, |(_, last)| i64::from(*last) + 1)
            };
            let value = i16::try_from(value).map_err(|_| invalid("Enum", "a value exceeds 16 bits"))?;
            values.push((text, value));
            if !self.take(b',') {
                break;
            }
        }
        self.close()?;
        let distinct_names: std::collections::BTreeSet<&str> =
            values.iter().map(|(text, _)| text.as_str()).collect();
        let distinct_values: std::collections::BTreeSet<i16> = values.iter().map(|(_, v)| *v).collect();
        if distinct_names.len() != values.len() || distinct_values.len() != values.len() {
            return Err(invalid("Enum", "a name or a value occurs twice"));
        }
        // The server lists them so; equal types must compare equal however they were written.
        values.sort_unstable_by_key(|(_, value)| *value);
        if name == "Enum16" {
            return Ok(ColumnType::Enum16(values));
        }
        let narrow: Option<Vec<(String, i8)>> =
            values.iter().map(|(text, v)| i8::try_from(*v).ok().map(|v| (text.clone(), v))).collect();
        match narrow {
            Some(narrow) => Ok(ColumnType::Enum8(narrow)),
            None if name == "Enum" => Ok(ColumnType::Enum16(values)),
            None => Err(invalid("Enum8", "a value exceeds 8 bits")),
        }
    }
}

fn invalid(name: &'static str, reason: &'static str) -> TypeError {
    TypeError::Invalid { name, reason }
}

fn decimal(precision: i64, scale: i64) -> Result<ColumnType, TypeError> {
    if !(1..=i64::from(MAX_DECIMAL_PRECISION)).contains(&precision) {
        return Err(invalid("Decimal", "its precision must be 1 to 38"));
    }
    if !(0..=precision).contains(&scale) {
        return Err(invalid("Decimal", "its scale must be 0 to its precision"));
    }
    Ok(ColumnType::Decimal { precision: precision as u8, scale: scale as u8 })
}
