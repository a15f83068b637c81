//! `flumen cluster`: what the cluster is, whether it is well, its brokers, its partitions.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::admin_client::{AdminArgs, failure, segment};
use super::table;
use super::topic::{show, text};
use super::{EXIT_UNHEALTHY, Failure};
use crate::admin_process::NOT_SERVING;

#[derive(Args)]
pub struct ClusterArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(subcommand)]
    command: ClusterCommand,
}

#[derive(Subcommand)]
enum ClusterCommand {
    /// Show what the cluster is and what it holds
    Info,
    /// Say what is wrong and what to do; exit status 10 when something is
    Health,
    /// List the brokers
    Brokers,
    /// Let a broker hand over all leaderships and take none, so that it can be stopped; --off ends it
    Maintenance {
        node: i32,
        #[arg(long)]
        off: bool,
    },
    /// Move everything off a broker that is to leave; `flumen cluster brokers` shows how far it is
    Decommission { node: i32 },
    /// Remove a broker that holds nothing any more
    Remove { node: i32 },
    /// Limit what brokers send to replicas that are far behind or new, in bytes per second, and get for their own: a number,
    /// "none" or "default". Replicas in sync are not held up, and what is written meanwhile does not count
    CatchUpRate {
        bytes_per_second: String,
        /// Only of this broker
        #[arg(long)]
        node: Option<i32>,
    },
    /// List partitions with leader, offsets, size and health: flumen cluster partitions orders
    Partitions {
        topic: Option<String>,
        /// Only those that do not serve
        #[arg(long)]
        unhealthy: bool,
        /// Those of internal topics too
        #[arg(short, long)]
        internal: bool,
    },
}

pub fn run(args: ClusterArgs) -> Result<(), Failure> {
    let admin = &args.admin;
    match args.command {
        ClusterCommand::Info => {
            let cluster = admin.get("/v1/cluster")?;
            show(admin, &cluster, || info(&cluster));
            Ok(())
        }
        ClusterCommand::Health => {
            let (status, health) = admin.exchange("GET", "/v1/cluster/health", None)?;
            if health["code"] == NOT_SERVING {
                show(admin, &health, || ());
                return Err(Failure { exit: EXIT_UNHEALTHY, ..failure(status, &health) });
            }
            if status != 200 {
                return Err(failure(status, &health));
            }
            show(admin, &health, || problems(&health));
            if health["is_healthy"] == Value::Bool(true) {
                return Ok(());
            }
            let reasons: Vec<String> = list(&health["unhealthy_reasons"]).map(text).collect();
            let message = format!("the cluster is not healthy: {}", reasons.join(", "));
            Err(Failure { message, exit: EXIT_UNHEALTHY })
        }
        ClusterCommand::Brokers => {
            let brokers = admin.get("/v1/brokers")?;
            let rows: Vec<Vec<String>> = list(&brokers)
                .map(|b| {
                    let address = format!("{}:{}", text(&b["host"]), text(&b["port"]));
                    let mut row = vec![text(&b["node_id"]), address];
                    row.extend(
                        [
                            "rack",
                            "membership_status",
                            "is_alive",
                            "version",
                            "partitions",
                            "connections",
                            "rpc_tls",
                            "disk_free_bytes",
                        ]
                        .map(|key| text(&b[key])),
                    );
                    row
                })
                .collect();
            let headers = [
                "NODE",
                "ADDRESS",
                "RACK",
                "STATUS",
                "ALIVE",
                "VERSION",
                "PARTITIONS",
                "CONNECTIONS",
                "RPC-TLS",
                "DISK-FREE-BYTES",
            ];
            show(admin, &brokers, || table::print(&headers, &rows));
            Ok(())
        }
        ClusterCommand::Maintenance { node, off } => {
            let action = if off { "active" } else { "maintenance" };
            let answer = admin.call("POST", &format!("/v1/brokers/{node}:{action}"), None)?;
            show(admin, &answer, || out!("broker {node} is {}", text(&answer["membership_status"])));
            Ok(())
        }
        ClusterCommand::Decommission { node } => {
            let answer = admin.call("POST", &format!("/v1/brokers/{node}:decommission"), None)?;
            show(admin, &answer, || {
                out!("broker {node} gives its replicas away; once it has none: flumen cluster remove {node}");
            });
            Ok(())
        }
        ClusterCommand::Remove { node } => {
            let answer = admin.call("DELETE", &format!("/v1/brokers/{node}"), None)?;
            show(admin, &answer, || out!("broker {node} is removed"));
            Ok(())
        }
        ClusterCommand::CatchUpRate { bytes_per_second, node } => {
            let rate = match bytes_per_second.as_str() {
                "none" => json!(i64::MAX),
                "default" => Value::Null,
                number => json!(number),
            };
            let body = json!({ "configs": { "flumen.catch.up.rate": rate }, "node_id": node });
            let answer = admin.call("PATCH", "/v1/cluster", Some(&body))?;
            let whose = node.map_or_else(|| "every broker".to_string(), |id| format!("broker {id}"));
            show(admin, &answer, || out!("the rate of {whose} is {bytes_per_second}"));
            Ok(())
        }
        ClusterCommand::Partitions { topic, unhealthy, internal } => {
            let topic = topic.map_or_else(String::new, |name| format!("&topic={}", segment(&name)));
            let partitions = admin.get(&format!("/v1/cluster/partitions?unhealthy={unhealthy}{topic}"))?;
            let named = !topic.is_empty();
            show(admin, &partitions, || {
                print_partitions(&partitions["partitions"], internal || unhealthy || named);
            });
            Ok(())
        }
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn info(cluster: &Value) {
    for (label, key) in [
        ("CLUSTER     ", "cluster_id"),
        ("VERSION     ", "version"),
        ("CONTROLLER  ", "controller_id"),
        ("BROKERS     ", "brokers"),
        ("TOPICS      ", "topics"),
        ("PARTITIONS  ", "partitions"),
        ("EXPORTS     ", "exports"),
        ("BYTES       ", "size_bytes"),
    ] {
        out!("{label}{}", text(&cluster[key]));
    }
}

fn problems(health: &Value) {
    out!("HEALTHY     {}", if health["is_healthy"] == Value::Bool(true) { "yes" } else { "no" });
    out!("CONTROLLER  {}", text(&health["controller_id"]));
    out!("BROKERS     {}", list(&health["all_nodes"]).map(text).collect::<Vec<_>>().join(", "));
    for (label, key) in [
        ("DOWN        ", "nodes_down"),
        ("NOT SERVING ", "nodes_not_serving"),
        ("LEADERLESS  ", "leaderless_partitions"),
        ("BEHIND      ", "under_replicated_partitions"),
    ] {
        let all: Vec<String> = list(&health[key]).map(text).collect();
        out!("{label}{}", if all.is_empty() { "none".to_string() } else { all.join(", ") });
    }
    for problem in list(&health["problems"]) {
        out!();
        let (severity, code) = (text(&problem["severity"]), text(&problem["code"]));
        out!("{severity}[{code}] broker {}: {}", text(&problem["node_id"]), text(&problem["subject"]));
        out!("  why     {}", text(&problem["detail"]));
        out!("  impact  {}", text(&problem["impact"]));
        out!("  fix     {}", text(&problem["fix"]));
    }
}

pub fn print_partitions(partitions: &Value, internal: bool) {
    let ids = |value: &Value| list(value).map(text).collect::<Vec<_>>().join(",");
    let rows: Vec<Vec<String>> = list(partitions)
        .filter(|p| internal || p["internal"] != Value::Bool(true))
        .map(|p| {
            let mut row: Vec<String> =
                ["topic", "partition", "leader", "leader_epoch"].map(|key| text(&p[key])).into();
            row.extend([ids(&p["replicas"]), ids(&p["in_sync_replicas"])]);
            row.extend(
                ["log_start_offset", "high_watermark", "size_bytes", "health"].map(|key| text(&p[key])),
            );
            row
        })
        .collect();
    let headers = [
        "TOPIC",
        "PARTITION",
        "LEADER",
        "EPOCH",
        "REPLICAS",
        "ISR",
        "LOG-START-OFFSET",
        "HIGH-WATERMARK",
        "BYTES",
        "HEALTH",
    ];
    table::print(&headers, &rows);
    for moving in list(partitions).filter(|p| !p["target_replicas"].is_null()) {
        print_move(moving);
    }
}

/// How far the replicas are that a move brings.
fn print_move(partition: &Value) {
    let to = list(&partition["target_replicas"]).map(text).collect::<Vec<_>>().join(",");
    let mut told: Vec<String> = list(&partition["move"]["replicas"])
        .map(|replica| {
            let number = |key: &str| replica[key].as_u64().unwrap_or(0);
            let (has, of) = (number("bytes"), number("of_bytes"));
            let percent = has.saturating_mul(100).checked_div(of).unwrap_or(100);
            let rate = number("bytes_per_second");
            let waits =
                replica["waits_for"].as_str().map_or_else(String::new, |what| format!(", waits for: {what}"));
            format!(
                "node {} has {has} of {of} bytes ({percent} %), {rate} bytes/s{waits}",
                text(&replica["node_id"])
            )
        })
        .collect();
    told.extend(partition["move"]["waits_for"].as_str().map(|what| format!("waits for: {what}")));
    if partition["move"].is_null() {
        told.push("its leader says nothing of it".to_string());
    }
    out!("{}/{} goes to {to}: {}", text(&partition["topic"]), text(&partition["partition"]), told.join("; "));
}
