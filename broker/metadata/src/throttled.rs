//! The replicas that an operator throttles, as Kafka's tools write them down.

use crate::config_def::list;

const FORM: &str = "must be '*' or a list of partition:broker";

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ThrottledReplicas {
    #[default]
    None,
    All,
    /// (partition, broker)
    These(Vec<(i32, i32)>),
}

impl ThrottledReplicas {
    pub fn parse(value: &str) -> Result<ThrottledReplicas, String> {
        let mut these = Vec::new();
        for element in list(value) {
            if element == "*" {
                return if list(value).count() == 1 { Ok(ThrottledReplicas::All) } else { Err(FORM.into()) };
            }
            let number = |text: &str| text.parse::<i32>().ok().filter(|number| *number >= 0);
            let pair = element.split_once(':').and_then(|(p, b)| Some((number(p)?, number(b)?)));
            these.push(pair.ok_or(FORM)?);
        }
        Ok(if these.is_empty() { ThrottledReplicas::None } else { ThrottledReplicas::These(these) })
    }

    pub(crate) fn check(value: &str) -> Result<(), String> {
        ThrottledReplicas::parse(value).map(drop)
    }

    pub fn has(&self, partition: i32, broker: i32) -> bool {
        match self {
            ThrottledReplicas::None => false,
            ThrottledReplicas::All => true,
            ThrottledReplicas::These(these) => these.contains(&(partition, broker)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_are_listed_as_kafka_lists_them() {
        assert_eq!(ThrottledReplicas::parse(""), Ok(ThrottledReplicas::None));
        assert_eq!(ThrottledReplicas::parse("*"), Ok(ThrottledReplicas::All));
        let some = ThrottledReplicas::parse("0:1,12:3").unwrap();
        assert!(some.has(0, 1) && some.has(12, 3) && !some.has(0, 3) && !some.has(1, 1));
        assert!(ThrottledReplicas::All.has(7, 7) && !ThrottledReplicas::None.has(7, 7));
        for bad in ["0", "0:", "a:1", "-1:1", "0:1,*", "0:1:2", "all"] {
            assert!(ThrottledReplicas::parse(bad).is_err(), "{bad}");
        }
    }
}
