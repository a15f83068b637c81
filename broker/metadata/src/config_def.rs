//! What a configuration is: its type, default, limits and documentation; how a value is checked and brought to
//! one form; where a value may come from.

use std::collections::BTreeMap;

/// Type as DescribeConfigs names it; the numbers are the wire's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConfigKind {
    Boolean = 1,
    String = 2,
    Int = 3,
    Short = 4,
    Long = 5,
    Double = 6,
    List = 7,
    Class = 8,
    Password = 9,
}

/// Where a value comes from; the numbers are the wire's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConfigSource {
    Topic = 1,
    DynamicBroker = 2,
    DynamicDefaultBroker = 3,
    StaticBroker = 4,
    Default = 5,
    Group = 8,
}

impl ConfigSource {
    pub fn name(self) -> &'static str {
        match self {
            ConfigSource::Topic => "topic",
            ConfigSource::DynamicBroker => "dynamic_broker",
            ConfigSource::DynamicDefaultBroker => "dynamic_default_broker",
            ConfigSource::StaticBroker => "static_broker",
            ConfigSource::Default => "default",
            ConfigSource::Group => "group",
        }
    }
}

/// Limits besides the type.
#[derive(Debug, Clone, Copy)]
pub enum Check {
    Any,
    Between(i64, i64),
    Ratio,
    OneOf(&'static [&'static str]),
    /// Every element of a list, which may be empty.
    SomeOf(&'static [&'static str]),
    With(fn(&str) -> Result<(), String>),
    /// As `With`, told the name as well.
    Named(fn(&str, &str) -> Result<(), String>),
}

pub const fn at_least(min: i64) -> Check {
    Check::Between(min, i64::MAX)
}

#[derive(Debug, Clone, Copy)]
pub struct ConfigDef {
    pub name: &'static str,
    pub kind: ConfigKind,
    /// `None`: not set unless somebody sets it.
    pub default: Option<&'static str>,
    pub check: Check,
    pub doc: &'static str,
    /// Whether it has an effect here. The others are accepted, stored and reported.
    pub honoured: bool,
}

impl ConfigDef {
    /// The value in the one form in which it is stored, or why it is refused.
    pub fn normalise(&self, value: &str) -> Result<String, String> {
        let normal = normalise_kind(self.kind, value)?;
        match self.check {
            Check::Any => {}
            Check::Between(min, max) => {
                let number: i64 = normal.parse().map_err(|_| "not a number".to_string())?;
                if number < min {
                    return Err(format!("must be at least {min}"));
                }
                if number > max {
                    return Err(format!("must be at most {max}"));
                }
            }
            Check::Ratio => {
                let number: f64 = normal.parse().map_err(|_| "not a number".to_string())?;
                if !(0.0..=1.0).contains(&number) {
                    return Err("must be between 0 and 1".into());
                }
            }
            Check::OneOf(names) => {
                if !names.contains(&normal.as_str()) {
                    return Err(format!("must be one of {}", names.join(", ")));
                }
            }
            Check::SomeOf(names) => {
                if !list(&normal).all(|e| names.contains(&e)) {
                    return Err(format!("may hold {}", names.join(", ")));
                }
            }
            Check::With(check) => check(&normal)?,
            Check::Named(check) => check(self.name, &normal)?,
        }
        Ok(normal)
    }

    pub fn documentation(&self) -> String {
        if self.honoured {
            self.doc.to_string()
        } else {
            format!("{} Accepted and reported; it has no effect here.", self.doc)
        }
    }

    pub fn is_sensitive(&self) -> bool {
        self.kind == ConfigKind::Password
    }
}

/// A topic configuration that another part of the broker brings along, such as the ClickHouse export.
#[derive(Debug, Clone, Copy)]
pub struct ExtraConfig {
    pub name: &'static str,
    /// Empty: not set unless somebody sets it.
    pub default: &'static str,
    pub kind: ConfigKind,
    pub doc: &'static str,
    /// Given the name and the value; the type has been checked before.
    pub validate: fn(&str, &str) -> Result<(), String>,
}

impl ExtraConfig {
    pub fn def(&self) -> ConfigDef {
        ConfigDef {
            name: self.name,
            kind: self.kind,
            default: if self.default.is_empty() { None } else { Some(self.default) },
            check: Check::Named(self.validate),
            doc: self.doc,
            honoured: true,
        }
    }
}

/// Broker-level values, in the order in which they count.
#[derive(Debug, Clone, Copy)]
pub struct Layers<'a> {
    pub node: Option<&'a BTreeMap<String, String>>,
    pub cluster: &'a BTreeMap<String, String>,
    pub fixed: &'a BTreeMap<String, String>,
}

impl<'a> Layers<'a> {
    pub fn in_order(&self) -> impl Iterator<Item = (ConfigSource, &'a BTreeMap<String, String>)> {
        self.node.map(|map| (ConfigSource::DynamicBroker, map)).into_iter().chain([
            (ConfigSource::DynamicDefaultBroker, self.cluster),
            (ConfigSource::StaticBroker, self.fixed),
        ])
    }
}

pub fn list(value: &str) -> impl Iterator<Item = &str> {
    value.split(',').map(str::trim).filter(|element| !element.is_empty())
}

fn normalise_kind(kind: ConfigKind, value: &str) -> Result<String, String> {
    let value = value.trim();
    let number = |min: i64, max: i64| match value.parse::<i64>() {
        Ok(n) if (min..=max).contains(&n) => Ok(n.to_string()),
        Ok(_) => Err(format!("must be between {min} and {max}")),
        Err(_) => Err("must be a whole number".to_string()),
    };
    match kind {
        ConfigKind::Boolean if value.eq_ignore_ascii_case("true") => Ok("true".into()),
        ConfigKind::Boolean if value.eq_ignore_ascii_case("false") => Ok("false".into()),
        ConfigKind::Boolean => Err("must be true or false".into()),
        ConfigKind::Int => number(i64::from(i32::MIN), i64::from(i32::MAX)),
        ConfigKind::Short => number(i64::from(i16::MIN), i64::from(i16::MAX)),
        ConfigKind::Long => number(i64::MIN, i64::MAX),
        ConfigKind::Double => match value.parse::<f64>() {
            Ok(n) if n.is_finite() => Ok(value.to_string()),
            _ => Err("must be a number".into()),
        },
        ConfigKind::List => Ok(list(value).collect::<Vec<_>>().join(",")),
        ConfigKind::String | ConfigKind::Class | ConfigKind::Password => Ok(value.to_string()),
    }
}

/// Names longer than this are compared by their start only: the work is quadratic and the name is a client's.
const COMPARED_BYTES_MAX: usize = 80;

/// The candidate that `name` was most likely meant to be; `None` when nothing is near.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (distance(name, candidate), candidate))
        .min()
        .filter(|(distance, candidate)| {
            *distance <= candidate.len().max(name.len().min(COMPARED_BYTES_MAX)) / 2
        })
        .map(|(_, candidate)| candidate)
}

/// `; did you mean 'x'?` or nothing.
pub fn suggestion<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(name, candidates).map_or_else(String::new, |near| format!("; did you mean '{near}'?"))
}

/// Edits that turn a client's `name` into `known`, upper and lower case being the same.
pub fn distance(name: &str, known: &str) -> usize {
    let a: Vec<u8> = name.bytes().take(COMPARED_BYTES_MAX).map(|b| b.to_ascii_lowercase()).collect();
    let b = known.as_bytes();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        row[0] = left;
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            left = cost.min(diagonal + 1).min(left + 1);
            row[j + 1] = left;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn def(kind: ConfigKind, check: Check) -> ConfigDef {
        ConfigDef { name: "x", kind, default: None, check, doc: "Doc.", honoured: false }
    }

    #[test]
    fn values_are_checked_and_brought_to_one_form() {
        assert_eq!(def(ConfigKind::Boolean, Check::Any).normalise(" TRUE "), Ok("true".into()));
        assert!(def(ConfigKind::Boolean, Check::Any).normalise("yes").is_err());
        assert_eq!(def(ConfigKind::Int, at_least(-1)).normalise("+7"), Ok("7".into()));
        assert!(def(ConfigKind::Int, at_least(-1)).normalise("-2").is_err());
        assert!(def(ConfigKind::Int, Check::Any).normalise("2147483648").is_err());
        assert!(def(ConfigKind::Long, Check::Any).normalise("9223372036854775808").is_err());
        assert!(def(ConfigKind::Double, Check::Ratio).normalise("NaN").is_err());
        assert!(def(ConfigKind::Double, Check::Ratio).normalise("1.01").is_err());
        assert_eq!(def(ConfigKind::List, Check::Any).normalise(" a, ,b ,"), Ok("a,b".into()));
        assert_eq!(def(ConfigKind::List, Check::SomeOf(&["a"])).normalise(""), Ok(String::new()));
        assert!(def(ConfigKind::List, Check::SomeOf(&["a"])).normalise("a,c").is_err());
        assert!(
            def(ConfigKind::String, Check::OneOf(&["a", "b"])).normalise("c").unwrap_err().contains("a, b")
        );
        assert!(def(ConfigKind::String, Check::Any).documentation().contains("no effect"));
    }

    #[test]
    fn the_nearest_name_is_found_and_nonsense_has_none() {
        let names = ["retention.ms", "retention.bytes", "segment.bytes"];
        assert_eq!(nearest("retension.ms", names), Some("retention.ms"));
        assert_eq!(nearest("Segment.Byte", names), Some("segment.bytes"));
        assert_eq!(nearest("qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq", names), None);
        assert_eq!(nearest("", names), None);
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(nearest(&"é".repeat(100_000), names), None);
    }
}
