//! What a process that does not serve clients yet waits for, in words, from its first moment on.
//!
//! Whoever makes a start wait says so here (`joining`, `controller::mend`, `server`); the admin API, the health of the cluster and
//! the port for brokers tell it on. Once the node serves there is nothing to say any more, whoever still tries.

use std::sync::Mutex;

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wait {
    /// What for: the end of a sentence that begins with the node.
    pub detail: String,
    pub fix: String,
}

/// None: it serves.
#[derive(Debug, Default)]
pub struct Waits(Mutex<Option<Wait>>);

impl Waits {
    pub fn starting() -> Waits {
        let waits = Waits(Mutex::new(Some(Wait { detail: String::new(), fix: String::new() })));
        waits.say("it has just started", "wait a moment");
        waits
    }

    pub fn say(&self, detail: impl Into<String>, fix: impl Into<String>) {
        if let Some(wait) = &mut *self.0.lock().expect("no panic under this lock") {
            *wait = Wait { detail: detail.into(), fix: fix.into() };
        }
    }

    pub fn end(&self) {
        *self.0.lock().expect("no panic under this lock") = None;
    }

    pub fn get(&self) -> Option<Wait> {
        self.0.lock().expect("no panic under this lock").clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_serves_waits_for_nothing() {
        let waits = Waits::starting();
        assert!(waits.get().is_some());
        waits.say("it reads", "wait");
        assert_eq!(waits.get(), Some(Wait { detail: "it reads".into(), fix: "wait".into() }));
        waits.end();
        waits.say("too late", "none");
        assert_eq!(waits.get(), None);
        assert_eq!(Waits::default().get(), None);
    }
}
