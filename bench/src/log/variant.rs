//! Who is measured and what its acknowledgement means: every figure carries one of these names.
//!
//! Plain data.

use crate::peer::Side;

/// A broker with the topic settings that decide when it acknowledges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    pub side: Side,
    pub name: &'static str,
    /// What an acknowledgement survives.
    pub promise: &'static str,
    pub configs: &'static [(&'static str, &'static str)],
}

pub const DURABLE: Variant = Variant {
    side: Side::Flumen,
    name: "Flumen durable",
    promise: "acknowledged after the disk has the records (its default): survives kill -9 and loss of power",
    configs: &[("flumen.durability", "durable")],
};

pub const OS: Variant = Variant {
    side: Side::Flumen,
    name: "Flumen os",
    promise: "acknowledged after the kernel has the records: survives kill -9, not loss of power",
    configs: &[("flumen.durability", "os")],
};

pub const KAFKA: Variant = Variant {
    side: Side::Kafka,
    name: "Kafka default",
    promise: "acknowledged after the kernel has the records (its default): survives kill -9, not loss of power",
    configs: &[],
};

pub const KAFKA_FLUSH: Variant = Variant {
    side: Side::Kafka,
    name: "Kafka flush=1",
    promise: "flush.messages=1, a sync per append: survives kill -9 and loss of power",
    configs: &[("flush.messages", "1")],
};

pub const NULL: Variant = Variant {
    side: Side::Null,
    name: "null",
    promise: "acknowledges and stores nothing: the floor of this machine, these sockets and this protocol",
    configs: &[],
};

pub const ALL: [Variant; 5] = [DURABLE, OS, KAFKA, KAFKA_FLUSH, NULL];

impl Variant {
    /// Part of a topic's name.
    pub fn slug(&self) -> String {
        self.name.to_lowercase().replace([' ', '='], "-")
    }

    pub fn topic_configs(&self, more: &[(&str, String)]) -> Vec<(String, String)> {
        let own = self.configs.iter().map(|(k, v)| (k.to_string(), v.to_string()));
        own.chain(more.iter().map(|(k, v)| (k.to_string(), v.clone()))).collect()
    }
}
