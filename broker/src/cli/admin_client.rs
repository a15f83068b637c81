//! Asking a running broker: JSON over its admin API.

use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::{EXIT_NOT_FOUND, Failure};

/// A broker that has begun to serve answers in well under this, even when it asks others or ClickHouse first: those it waits for
/// no longer than ten seconds.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);

#[derive(Args, Clone)]
pub struct AdminArgs {
    /// Admin address of the broker
    #[arg(long, global = true, env = "FLUMEN_ADMIN", default_value = "127.0.0.1:9644")]
    admin: String,
    /// Output: text or json
    #[arg(long, global = true, default_value = "text", value_parser = ["text", "json"])]
    format: String,
}

impl AdminArgs {
    pub fn is_json(&self) -> bool {
        self.format == "json"
    }

    pub fn get(&self, path: &str) -> Result<Value, Failure> {
        self.call("GET", path, None)
    }

    /// Sends one request. An answer that is not 2xx becomes the failure that its body describes.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        let (status, value) = self.exchange(method, path, body)?;
        if (200..300).contains(&status) { Ok(value) } else { Err(failure(status, &value)) }
    }

    /// Sends one request: the status of the answer, and what it says.
    pub fn exchange(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value), Failure> {
        let base =
            if self.admin.contains("://") { self.admin.clone() } else { format!("http://{}", self.admin) };
        let url = format!("{}{path}", base.trim_end_matches('/'));
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIME_MAX))
            .timeout_recv_response(Some(ANSWER_TIME_MAX))
            .build()
            .into();
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(&url)
            .header("content-type", "application/json")
            .body(body.map(Value::to_string).unwrap_or_default())
            .map_err(|e| Failure::new(format!("{url}: {e}")))?;
        let mut response = agent.run(request).map_err(|e| match e {
            ureq::Error::Timeout(ureq::Timeout::RecvResponse) => Failure::new(format!(
                "the broker at {base} has not answered for {} s: it may still wait for the others of its cluster, which its \
                 log says; what was asked for may or may not be done",
                ANSWER_TIME_MAX.as_secs()
            )),
            e => Failure::new(format!(
                "no broker answers at {base} ({e}); start one, or name its address with --admin"
            )),
        })?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string().map_err(|e| Failure::new(e.to_string()))?;
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Ok((status, value))
    }
}

/// What an answer says that is not 2xx.
pub fn failure(status: u16, answer: &Value) -> Failure {
    let mut message = answer["detail"].as_str().map_or_else(|| answer.to_string(), str::to_string);
    if let Some(fix) = answer["fix"].as_str() {
        message.push_str("\n  fix: ");
        message.push_str(fix);
    }
    let exit = if status == 404 { EXIT_NOT_FOUND } else { super::EXIT_FAILED };
    Failure { message, exit }
}

/// Percent-encodes one path segment.
pub fn segment(name: &str) -> String {
    let mut out = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}
