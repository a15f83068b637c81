//! `flumen export`.

use clap::{ArgGroup, Args, Subcommand};
use serde_json::{Value, json};

use super::admin_client::{AdminArgs, segment};
use super::topic::{key_values, show, text};
use super::{EXIT_UNHEALTHY, Failure, table};

#[derive(Args)]
pub struct ExportArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(subcommand)]
    command: ExportCommand,
}

#[derive(Subcommand)]
enum ExportCommand {
    /// Turn export on: flumen export create orders --table orders --columns 'id UInt64, price Decimal(10,2)'
    Create {
        topic: String,
        /// ClickHouse URL; the broker's clickhouse.url when absent
        #[arg(long)]
        clickhouse: Option<String>,
        #[arg(long)]
        database: Option<String>,
        /// Table name; the topic's when absent
        #[arg(long)]
        table: Option<String>,
        /// Columns of a table to create; inferred from records when absent
        #[arg(long)]
        columns: Option<String>,
        #[arg(long)]
        order_by: Option<String>,
        /// Create the table when it is not there
        #[arg(long)]
        auto_create: bool,
        /// exactly_once, token_only or at_least_once
        #[arg(long)]
        delivery: Option<String>,
        /// Any further setting: -c unknown.fields=dlq
        #[arg(short, long = "config", value_name = "KEY=VALUE")]
        config: Vec<String>,
        /// Show the guarantee, the warnings and the DDL, and change nothing
        #[arg(long)]
        dry: bool,
    },
    /// List exports
    List,
    /// Show the state of one export; exit 10 when it is not running
    Status { topic: String },
    /// Keep the export and its position, but send nothing
    Pause { topic: String },
    /// Go on, and look again at once at whatever the export waits for
    Resume { topic: String },
    /// Export again (or skip) from another position; only while the export is paused or failed. Rows that the table
    /// holds already are not inserted twice: flumen export reset orders --to-earliest
    #[command(group(ArgGroup::new("to").required(true)))]
    Reset {
        topic: String,
        /// All partitions when absent
        #[arg(long)]
        partition: Option<i32>,
        #[arg(long, group = "to")]
        to_earliest: bool,
        #[arg(long, group = "to")]
        to_latest: bool,
        #[arg(long, group = "to", value_name = "OFFSET")]
        to_offset: Option<u64>,
    },
    /// Turn export off; the table stays
    Delete { topic: String },
}

pub fn run(args: ExportArgs) -> Result<(), Failure> {
    let admin = &args.admin;
    let path = |topic: &str| format!("/v1/exports/{}", segment(topic));
    match args.command {
        ExportCommand::Create {
            topic,
            clickhouse,
            database,
            table,
            columns,
            order_by,
            auto_create,
            delivery,
            config,
            dry,
        } => {
            let mut body = Value::Object(key_values(&config)?);
            let named = [
                ("endpoint", clickhouse),
                ("database", database),
                ("table", table),
                ("columns", columns),
                ("order_by", order_by),
                ("delivery", delivery),
            ];
            for (key, value) in named {
                if let Some(value) = value {
                    body[key] = json!(value);
                }
            }
            if auto_create {
                body["auto_create"] = json!(true);
            }
            let answer = if dry {
                admin.call("POST", &format!("{}:validate", path(&topic)), Some(&body))?
            } else {
                admin.call("PUT", &path(&topic), Some(&body))?
            };
            show(admin, &answer, || {
                out!("TOPIC      {topic}");
                out!("GUARANTEE  {}", text(&answer["guarantee"]));
                for key in ["reasons", "warnings"] {
                    for line in answer[key].as_array().into_iter().flatten() {
                        out!("{:<10} {}", key.trim_end_matches('s').to_uppercase(), text(line));
                    }
                }
                if let Some(ddl) = answer["ddl"].as_str() {
                    out!("\n{ddl}");
                }
            });
        }
        ExportCommand::List => {
            let list = admin.get("/v1/exports")?;
            let rows: Vec<Vec<String>> = list["exports"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|e| {
                    ["topic", "state", "guarantee", "lag_records", "rows_total", "dead_letters_total"]
                        .iter()
                        .map(|k| text(&e[*k]))
                        .collect()
                })
                .collect();
            show(admin, &list, || {
                table::print(&["TOPIC", "STATE", "GUARANTEE", "LAG", "ROWS", "DEAD-LETTERS"], &rows);
            });
        }
        ExportCommand::Status { topic } => {
            let status = admin.get(&format!("{}/status", path(&topic)))?;
            show(admin, &status, || describe(&status));
            if status["state"] != "running" {
                let state = text(&status["state"]);
                return Err(Failure { message: format!("export {topic} is {state}"), exit: EXIT_UNHEALTHY });
            }
        }
        ExportCommand::Pause { topic } => {
            admin.call("POST", &format!("{}:pause", path(&topic)), None)?;
            out!("paused export of {topic}");
        }
        ExportCommand::Resume { topic } => {
            admin.call("POST", &format!("{}:resume", path(&topic)), None)?;
            out!("resumed export of {topic}");
        }
        ExportCommand::Reset { topic, partition, to_earliest, to_latest: _, to_offset } => {
            let to = match (to_earliest, to_offset) {
                (true, _) => json!("earliest"),
                (_, Some(offset)) => json!(offset),
                _ => json!("latest"),
            };
            let mut body = json!({ "to": to });
            if let Some(partition) = partition {
                body["partition"] = json!(partition);
            }
            let status = admin.call("POST", &format!("{}:reset", path(&topic)), Some(&body))?;
            show(admin, &status, || {
                out!("export of {topic} goes on from here when it is resumed:\n");
                partitions(&status);
            });
        }
        ExportCommand::Delete { topic } => {
            admin.call("DELETE", &path(&topic), None)?;
            out!("turned export of {topic} off; the table stays");
        }
    }
    Ok(())
}

/// Milliseconds since 1970 as how long ago that is.
fn ago(ms: &Value) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX));
    match ms.as_i64() {
        Some(at) => format!("{:.1} s ago", (now - at).max(0) as f64 / 1000.0),
        None => "never".to_string(),
    }
}

fn describe(status: &Value) {
    let line = |name: &str, value: String| out!("{name:<13}{value}");
    let at = |value: &Value| text(value);
    line("TOPIC", at(&status["topic"]));
    line(
        "TABLE",
        format!("{}.{} on {}", at(&status["database"]), at(&status["table"]), at(&status["endpoint"])),
    );
    line(
        "STATE",
        format!("{} since {}: {}", at(&status["state"]), ago(&status["since_ms"]), at(&status["reason"])),
    );
    line("GUARANTEE", at(&status["guarantee"]));
    line(
        "LAG",
        format!(
            "{} records, {} s (target {} ms)",
            at(&status["lag_records"]),
            at(&status["lag_seconds"]),
            at(&status["target_lag_ms"])
        ),
    );
    line(
        "EXPORTED",
        format!(
            "{} rows, {:.0} a second; {} dead letters in {}; {} skipped",
            at(&status["rows_total"]),
            status["rows_per_second"].as_f64().unwrap_or(0.0),
            at(&status["dead_letters_total"]),
            at(&status["dead_letter_topic"]),
            at(&status["skipped_total"])
        ),
    );
    let ms = |value: &Value| {
        format!(
            "{:.0}/{:.0} ms",
            value["p50_ms"].as_f64().unwrap_or(0.0),
            value["p99_ms"].as_f64().unwrap_or(0.0)
        )
    };
    line("INSERT", format!("p50/p99 {}; visible after {}", ms(&status["insert"]), ms(&status["visibility"])));
    line("BREAKER", at(&status["breaker"]));
    if let Some(retry) = status["retry_in_ms"].as_u64() {
        line("RETRY", format!("in {retry} ms"));
    }
    for warning in status["warnings"].as_array().into_iter().flatten() {
        line("WARNING", at(warning));
    }
    let error = &status["last_error"];
    if error.is_object() {
        line(
            "LAST ERROR",
            format!(
                "{} ({} times, last {})",
                at(&error["message"]),
                at(&error["count"]),
                ago(&error["last_seen_ms"])
            ),
        );
        line("  fix", at(&error["hint"]));
    }
    out!();
    partitions(status);
}

fn partitions(status: &Value) {
    let columns = ["partition", "log_start_offset", "settled_offset", "last_stable_offset", "lag_records"];
    let rows: Vec<Vec<String>> = status["partitions"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|p| columns.iter().map(|k| text(&p[*k])).collect())
        .collect();
    table::print(&["PARTITION", "LOG-START-OFFSET", "SETTLED-OFFSET", "LOG-END-OFFSET", "LAG"], &rows);
}
