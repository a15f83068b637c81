//! What the admin API answers for before there is a node, and from when on it answers for that. The sentences are `waits`'s.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::extract::FromRequestParts;
use axum::http::StatusCode;
use axum::http::request::Parts;

use crate::admin_http::Problem;
use crate::node::Node;
use crate::waits::{Wait, Waits};

/// What the API answers for: a process, and from some moment on the node in it.
pub(crate) struct Admin {
    node_id: i32,
    waits: Arc<Waits>,
    started: Instant,
    node: OnceLock<Arc<Node>>,
}

impl Admin {
    pub fn new(node_id: i32, waits: Arc<Waits>, started: Instant) -> Arc<Admin> {
        Arc::new(Admin { node_id, waits, started, node: OnceLock::new() })
    }

    /// From here on the node answers, as soon as it knows anything.
    pub fn serve(&self, node: Arc<Node>) {
        let _ = self.node.set(node);
    }

    pub(crate) fn node(&self) -> Option<&Arc<Node>> {
        self.node.get()
    }

    pub(crate) fn node_id(&self) -> i32 {
        self.node_id
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    pub(crate) fn wait(&self) -> Option<Wait> {
        self.waits.get()
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.node.get().is_some_and(|node| node.is_ready())
    }

    fn not_serving(&self) -> Problem {
        let wait = self.waits.get();
        let (detail, fix) = wait.map_or_else(Default::default, |wait| (wait.detail, wait.fix));
        Problem {
            status: StatusCode::SERVICE_UNAVAILABLE,
            code: NOT_SERVING,
            detail: format!("node {} does not serve yet: {detail}", self.node_id),
            fix: Some(fix),
        }
    }
}

/// The code of an answer by which the command line knows that there is a broker, and what it has to wait for.
pub(crate) const NOT_SERVING: &str = "NOT_SERVING";

/// The node, or a refusal that says what it waits for.
pub(crate) struct Shared(pub Arc<Node>);

impl FromRequestParts<Arc<Admin>> for Shared {
    type Rejection = Problem;

    async fn from_request_parts(_: &mut Parts, admin: &Arc<Admin>) -> Result<Shared, Problem> {
        let node = admin.node.get().filter(|node| node.knows_metadata());
        node.cloned().map(Shared).ok_or_else(|| admin.not_serving())
    }
}
