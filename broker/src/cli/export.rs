//! `flumen export`.

use clap::{Args, Subcommand};
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
    Status {
        topic: String,
    },
    Pause {
        topic: String,
    },
    Resume {
        topic: String,
    },
    /// Turn export off; the table stays
    Delete {
        topic: String,
    },
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
            show(admin, &status, || {
                out!("{}", serde_json::to_string_pretty(&status).unwrap_or_default());
            });
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
        ExportCommand::Delete { topic } => {
            admin.call("DELETE", &path(&topic), None)?;
            out!("turned export of {topic} off; the table stays");
        }
    }
    Ok(())
}
