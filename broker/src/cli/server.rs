//! `flumen server` and `flumen clickhouse`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use flumen_metadata::BrokerConfig;

use super::Failure;
use crate::cluster::ClusterOptions;
use crate::cluster::exposure::{self, Security};
use crate::server::{self, ServerOptions};

#[derive(Args)]
pub struct ServerArgs {
    /// Where topics, their logs and the metadata live; created when absent
    #[arg(long)]
    data_dir: PathBuf,
    /// Address for Kafka clients
    #[arg(long, default_value = "127.0.0.1:9092")]
    kafka: SocketAddr,
    /// Address for the admin API and metrics
    #[arg(long, default_value = "127.0.0.1:9644")]
    admin: SocketAddr,
    /// Id of this node in its cluster, over node.id of the configuration
    #[arg(long)]
    node_id: Option<i32>,
    /// Address for other brokers; without it this one stays alone
    #[arg(long, requires = "seeds")]
    rpc: Option<SocketAddr>,
    /// What other brokers are told of --rpc, when it is not that: HOST:PORT
    #[arg(long, requires = "rpc", value_name = "HOST:PORT")]
    advertise_rpc: Option<String>,
    /// RPC addresses of the brokers that found the cluster together, the same list on each, or that a new one asks
    #[arg(long, requires = "rpc", value_delimiter = ',', value_name = "HOST:PORT,...")]
    seeds: Vec<String>,
    /// PEM file with this broker's certificate, and those between it and the authority: other brokers have to show one, too
    #[arg(long, requires = "rpc", value_name = "FILE")]
    rpc_tls_cert: Option<PathBuf>,
    /// PEM file with the key of that certificate
    #[arg(long, requires = "rpc", value_name = "FILE")]
    rpc_tls_key: Option<PathBuf>,
    /// PEM file with the authority that signs the certificates of brokers
    #[arg(long, requires = "rpc", value_name = "FILE")]
    rpc_tls_ca: Option<PathBuf>,
    /// --rpc is on a network that nobody but brokers reaches, and needs no certificates
    #[arg(long, requires = "rpc")]
    rpc_plaintext: bool,
    /// Shards (threads with partitions of their own); one per core but one when absent
    #[arg(long)]
    shards: Option<usize>,
    /// File of `key=value` lines (server.properties style; # starts a comment)
    #[arg(long)]
    config: Option<PathBuf>,
    /// One setting, over the file: --set num.partitions=4
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Args)]
pub struct ClickhouseArgs {
    /// Where the engine keeps its tables; created when absent
    #[arg(long)]
    data_dir: PathBuf,
    #[arg(long, default_value = "127.0.0.1:8123")]
    listen: SocketAddr,
    /// Path of libchdb.so; searched for in the usual places when absent
    #[arg(long)]
    lib: Option<PathBuf>,
}

fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FLUMEN_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    // Standard output belongs to the ready line. Colours are for eyes: a file would keep their codes.
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        // It would say on standard error that standard error cannot be written to, and panic when that fails: a full disk
        // under the log file must not end whoever has something to say.
        .log_internal_errors(false)
        .init();
}

pub fn server(args: ServerArgs) -> Result<(), Failure> {
    start_logging();
    if args.shards == Some(0) {
        return Err(Failure::new("--shards must be at least 1"));
    }
    let mut settings = BTreeMap::new();
    if let Some(path) = &args.config {
        read_properties(path, &mut settings)?;
    }
    for setting in &args.set {
        let Some((key, value)) = setting.split_once('=') else {
            return Err(Failure::new(format!("--set wants KEY=VALUE, got '{setting}'")));
        };
        settings.insert(key.trim().to_string(), value.trim().to_string());
    }
    if let Some(id) = args.node_id {
        settings.insert("node.id".to_string(), id.to_string());
    }
    let security = security(&args, &mut settings)?;
    let config = BrokerConfig::from_map(&settings)
        .map_err(|e| Failure::new(e.to_string()))?
        .with_topic_extras(crate::export::topic_configs());
    server::run(ServerOptions {
        data_dir: args.data_dir,
        kafka: args.kafka,
        admin: args.admin,
        shards: args.shards,
        config,
        cluster: args.rpc.map(|rpc| ClusterOptions {
            rpc,
            advertise_rpc: args.advertise_rpc,
            seeds: args.seeds,
            security,
        }),
    })
    .map_err(|e| Failure::new(format!("{e:#}")))
}

/// The options, and below them what the configuration says of the same.
fn security(args: &ServerArgs, settings: &mut BTreeMap<String, String>) -> Result<Security, Failure> {
    let mut file = |given: &Option<PathBuf>, key| {
        let set = settings.remove(key).filter(|path| !path.is_empty());
        given.clone().or(set.map(PathBuf::from))
    };
    let cert = file(&args.rpc_tls_cert, "flumen.rpc.tls.cert");
    let key = file(&args.rpc_tls_key, "flumen.rpc.tls.key");
    let ca = file(&args.rpc_tls_ca, "flumen.rpc.tls.ca");
    let plaintext = match settings.remove("flumen.rpc.plaintext").as_deref() {
        None | Some("false") => args.rpc_plaintext,
        Some("true") => true,
        Some(other) => {
            return Err(Failure::new(format!("flumen.rpc.plaintext is true or false, not '{other}'")));
        }
    };
    exposure::security(cert, key, ca, plaintext).map_err(Failure::new)
}

fn read_properties(path: &Path, settings: &mut BTreeMap<String, String>) -> Result<(), Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::new(format!("cannot read the configuration {}: {e}", path.display())))?;
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            return Err(Failure::new(format!("{}:{}: expected key=value", path.display(), number + 1)));
        };
        settings.insert(key.trim().to_string(), value.trim().to_string());
    }
    Ok(())
}

pub fn clickhouse(args: ClickhouseArgs) -> Result<(), Failure> {
    start_logging();
    flumen_embedded::serve(flumen_embedded::ServeOptions {
        data_dir: args.data_dir,
        listen: args.listen,
        lib: args.lib,
    })
    .map_err(|e| Failure::new(e.to_string()))
}
