//! How a starting process learns which cluster it belongs to: from its data directory, or from its seeds.
//!
//! The thin shell around `bootstrap::decide`: asks every seed who it is, again and again, stores the decision, and returns.
//! A directory that belongs to a cluster asks nobody. It does not register the node; the controller does.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::{Bytes, BytesMut};
use flumen_peer::{Frame, HELLO_BODY_MAX, Request, VERSION_MIN};
use futures_util::future::join_all;
use tokio::time::timeout;
use uuid::Uuid;

use super::ClusterOptions;
use super::bootstrap::{Decision, Presence, Standing, State, decide};
use super::identity::{ClusterId, Founder, Identity};
use super::listener::{Rpc, stranger};
use super::requests;
use super::stream::Stream;
use super::tls::RpcTls;
use super::wire::{FrameReader, LinkError, write_frame};
use crate::node::now_ms;

const ASK_TIME_MAX: Duration = Duration::from_secs(2);
const ASK_INTERVAL: Duration = Duration::from_millis(100);
/// Node ids of the largest cluster, as text.
const PRESENCE_BYTES_MAX: usize = 64 << 10;

/// The identity of this directory, and where others reach this node.
pub async fn find_cluster(
    options: &ClusterOptions,
    node_id: i32,
    boot_id: u64,
    data_dir: &Path,
    rpc: &Arc<Rpc>,
) -> anyhow::Result<(Identity, String)> {
    let identity = Identity::load(data_dir)?;
    let (identity, own_seed) = match identity {
        Some(identity) if identity.node_id != node_id => bail!(
            "{} belongs to node {} of cluster {}; start it with --node-id {}, or give node {node_id} a directory of its own",
            data_dir.display(),
            identity.node_id,
            identity.cluster_id,
            identity.node_id
        ),
        Some(identity) => {
            let own = identity.founders.iter().find(|f| f.node_id == node_id).map(|f| f.address.clone());
            (identity, own)
        }
        None => {
            let has_data = has_data(data_dir)?;
            if has_data && options.seeds.len() != 1 {
                bail!(refusal_of_data(data_dir));
            }
            let seeds = options.seeds.clone();
            let own = Presence { node_id, boot_id, seeds, state: State::Empty, waits: None, clock_ms: 0 };
            let (cluster_id, founders, own_seed) = ask_until_decided(&own, rpc).await?;
            if has_data {
                // What it has is what the cluster has, so it must be the only one that founds it.
                if !matches!(&founders[..], [only] if only.node_id == node_id) {
                    bail!(refusal_of_data(data_dir));
                }
                tracing::info!("the topics of this broker, which was alone, are the cluster's");
            }
            let identity =
                Identity { cluster_id, node_id, directory_id: Uuid::new_v4(), founders, registered: false };
            identity.store(data_dir)?;
            (identity, own_seed)
        }
    };
    let address = match (&options.advertise_rpc, own_seed) {
        (Some(advertised), _) => advertised.clone(),
        (None, Some(seed)) => seed,
        (None, None) if options.rpc.ip().is_unspecified() => {
            bail!(
                "--rpc {} names no address that others could connect to; add --advertise-rpc HOST:PORT",
                options.rpc
            )
        }
        (None, None) => options.rpc.to_string(),
    };
    rpc.set_state(State::Member {
        cluster_id: identity.cluster_id.to_string(),
        founders: identity.founders.clone(),
        nodes: Vec::new(),
        standing: if identity.registered { Standing::Known } else { Standing::New },
    });
    tracing::info!(cluster_id = %identity.cluster_id, node_id, address, founders = identity.founders.len(), "member of a cluster");
    Ok((identity, address))
}

/// Topics of a broker that was alone would be lost in a cluster that somebody else forms.
fn has_data(data_dir: &Path) -> anyhow::Result<bool> {
    let log = data_dir.join("log");
    let listed = std::fs::read_dir(&log).with_context(|| format!("{}", log.display()))?.next().is_some();
    Ok(listed || data_dir.join("metadata").exists())
}

fn refusal_of_data(data_dir: &Path) -> String {
    format!(
        "{} holds the topics of a broker that was alone; start it without --rpc, or with itself as the only one in --seeds, \
         which founds a cluster that has these topics; or give this node an empty data directory",
        data_dir.display()
    )
}

async fn ask_until_decided(
    own: &Presence,
    rpc: &Rpc,
) -> anyhow::Result<(ClusterId, Vec<Founder>, Option<String>)> {
    let tls = rpc.tls();
    let mut told = String::new();
    let mut told_of_seeds = vec![String::new(); own.seeds.len()];
    loop {
        let asked = own.seeds.iter().map(|seed| async {
            timeout(ASK_TIME_MAX, who_is(own, seed, tls)).await.unwrap_or(Err(LinkError::Silent))
        });
        let asked = join_all(asked).await;
        for ((seed, answer), told) in own.seeds.iter().zip(&asked).zip(&mut told_of_seeds) {
            // What is not there yet is waited for; what will not have this broker is worth a word.
            if let Err(error @ (LinkError::Tls(_) | LinkError::Refused(_))) = answer
                && *told != error.to_string()
            {
                *told = error.to_string();
                tracing::warn!(seed, %error, "a seed and this broker do not come together; trying again");
            }
        }
        if asked.iter().all(|answer| matches!(answer, Err(LinkError::Refused(_))))
            && let Some(Err(refusal)) = asked.first()
        {
            bail!("no seed will have this broker: {refusal}");
        }
        let answers: Vec<Option<Presence>> = asked.into_iter().map(Result::ok).collect();
        match decide(&Presence { clock_ms: now_ms(), ..own.clone() }, &answers) {
            Decision::Wait(sentence) => {
                // What keeps a seed and this broker apart is what has to be mended first.
                let apart = own.seeds.iter().zip(&told_of_seeds).filter(|(_, error)| !error.is_empty());
                let apart: Vec<String> = apart.map(|(seed, error)| format!("; {seed}: {error}")).collect();
                rpc.waits().say(
                    format!("{sentence}{}", apart.concat()),
                    format!(
                        "start the brokers that --seeds names ({}), all with the same list; this one goes on by itself",
                        own.seeds.join(",")
                    ),
                );
                if sentence != told {
                    tracing::info!("{sentence}");
                    told = sentence;
                }
                tokio::time::sleep(ASK_INTERVAL).await;
            }
            Decision::Refuse(sentence) => bail!(sentence),
            Decision::Found(founders) => {
                let own_seed = founders.iter().find(|f| f.node_id == own.node_id).map(|f| f.address.clone());
                return Ok((ClusterId::random(), founders, own_seed));
            }
            Decision::Adopt { cluster_id, founders, address } => {
                return Ok((parse(&cluster_id)?, founders, Some(address)));
            }
            Decision::Join { cluster_id, founders } => return Ok((parse(&cluster_id)?, founders, None)),
        }
    }
}

fn parse(cluster_id: &str) -> anyhow::Result<ClusterId> {
    cluster_id.parse().map_err(anyhow::Error::msg)
}

/// Asks whoever listens at an address; that need not be ready for anything else.
pub(crate) async fn who_is(own: &Presence, seed: &str, tls: Option<&RpcTls>) -> Result<Presence, LinkError> {
    let stream = Stream::connect(seed, tls).await?;
    ask_who(own, stream).await.map_err(|error| match tls {
        Some(tls) => tls.explain(error, &format!("the broker at {seed}")),
        None => error,
    })
}

async fn ask_who(own: &Presence, stream: Stream) -> Result<Presence, LinkError> {
    let Stream { mut reads, mut writes } = stream;
    let mut reader = FrameReader::new(BytesMut::new());
    write_frame(&mut writes, &Frame::Hello(stranger(own)), 0).await?;
    match reader.next_frame(&mut reads, HELLO_BODY_MAX).await? {
        Frame::Hello(_) => {}
        Frame::Refusal(refusal) => return Err(refusal.into()),
        _ => return Err(LinkError::Unexpected("something other than a hello")),
    }
    let question = Request { id: 1, kind: requests::WHO, body: Bytes::new() };
    write_frame(&mut writes, &Frame::Request(question), VERSION_MIN).await?;
    match reader.next_frame(&mut reads, PRESENCE_BYTES_MAX).await? {
        Frame::Answer(answer) => Ok(serde_json::from_slice(&answer.body).map_err(std::io::Error::other)?),
        _ => Err(LinkError::Unexpected("something other than an answer")),
    }
}
