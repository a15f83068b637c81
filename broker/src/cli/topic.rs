//! `flumen topic`.

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::Failure;
use super::admin_client::{AdminArgs, segment};
use super::table;

#[derive(Args)]
pub struct TopicArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(subcommand)]
    command: TopicCommand,
}

#[derive(Subcommand)]
enum TopicCommand {
    /// Create a topic: flumen topic create orders -p 4 -c retention.ms=86400000
    Create {
        name: String,
        #[arg(short, long, default_value_t = -1)]
        partitions: i32,
        #[arg(short, long, default_value_t = -1, allow_negative_numbers = true)]
        replicas: i16,
        #[arg(short, long = "config", value_name = "KEY=VALUE")]
        config: Vec<String>,
        /// Succeed when the topic is already there
        #[arg(long)]
        if_not_exists: bool,
    },
    /// List topics
    List {
        /// Internal topics too
        #[arg(short, long)]
        internal: bool,
    },
    /// Show partitions, offsets and configuration of a topic
    Describe { name: String },
    /// Delete a topic and its records
    Delete { name: String },
    /// Change configuration or add partitions: flumen topic alter orders -c retention.ms=1000 --partitions 8
    Alter {
        name: String,
        #[arg(short, long = "config", value_name = "KEY=VALUE")]
        config: Vec<String>,
        /// Back to the default
        #[arg(short, long = "delete-config", value_name = "KEY")]
        delete_config: Vec<String>,
        #[arg(short, long)]
        partitions: Option<i32>,
    },
}

pub fn key_values(settings: &[String]) -> Result<Map<String, Value>, Failure> {
    settings
        .iter()
        .map(|s| {
            s.split_once('=')
                .map(|(k, v)| (k.trim().to_string(), Value::from(v.trim())))
                .ok_or_else(|| Failure::new(format!("expected KEY=VALUE, got '{s}'")))
        })
        .collect()
}

pub fn run(args: TopicArgs) -> Result<(), Failure> {
    let admin = &args.admin;
    match args.command {
        TopicCommand::Create { name, partitions, replicas, config, if_not_exists } => {
            let body = json!({
                "name": name, "partitions": partitions, "replication_factor": replicas,
                "configs": key_values(&config)?, "if_not_exists": if_not_exists,
            });
            let created = admin.call("POST", "/v1/topics", Some(&body))?;
            show(admin, &created, || out!("created topic {name} with {} partitions", created["partitions"]));
        }
        TopicCommand::List { internal } => {
            let topics = admin.get("/v1/topics")?;
            let rows: Vec<Vec<String>> = topics["topics"]
                .as_array()
                .into_iter()
                .flatten()
                .filter(|t| internal || t["internal"] != Value::Bool(true))
                .map(|t| {
                    vec![text(&t["name"]), text(&t["partitions"]), text(&t["export"]), text(&t["size_bytes"])]
                })
                .collect();
            show(admin, &topics, || table::print(&["NAME", "PARTITIONS", "EXPORT", "BYTES"], &rows));
        }
        TopicCommand::Describe { name } => {
            let topic = admin.get(&format!("/v1/topics/{}", segment(&name)))?;
            show(admin, &topic, || describe(&topic));
        }
        TopicCommand::Delete { name } => {
            let deleted = admin.call("DELETE", &format!("/v1/topics/{}", segment(&name)), None)?;
            show(admin, &deleted, || out!("deleted topic {name}"));
        }
        TopicCommand::Alter { name, config, delete_config, partitions } => {
            let mut configs = key_values(&config)?;
            configs.extend(delete_config.into_iter().map(|k| (k, Value::Null)));
            let mut body = json!({ "configs": configs });
            if let Some(partitions) = partitions {
                body["partitions"] = json!(partitions);
            }
            let altered = admin.call("PATCH", &format!("/v1/topics/{}", segment(&name)), Some(&body))?;
            show(admin, &altered, || out!("altered topic {name}"));
        }
    }
    Ok(())
}

pub fn show(admin: &AdminArgs, value: &Value, as_text: impl FnOnce()) {
    if admin.is_json() {
        out!("{}", serde_json::to_string_pretty(value).unwrap_or_default());
    } else {
        as_text();
    }
}

pub fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_string(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

fn describe(topic: &Value) {
    out!("NAME        {}", text(&topic["name"]));
    out!("ID          {}", text(&topic["id"]));
    out!("DURABILITY  {}", text(&topic["durability"]));
    out!("GUARANTEE   {}", text(&topic["durability_meaning"]));
    out!();
    super::cluster::print_partitions(&topic["partition_list"], true);
    out!();
    let rows: Vec<Vec<String>> = topic["configs"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| vec![k.clone(), text(&v["value"]), text(&v["source"])])
        .collect();
    table::print(&["KEY", "VALUE", "SOURCE"], &rows);
}
