//! What makes several brokers one cluster: who they are, how they reach each other, who leads what.

pub mod leaders;

use std::net::SocketAddr;

/// What the command line says of the cluster.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Where other brokers reach this one.
    pub rpc: SocketAddr,
    /// What others are told of that, when it is not `rpc` itself: HOST:PORT.
    pub advertise_rpc: Option<String>,
    /// HOST:PORT of the brokers that found the cluster, or that a new one asks.
    pub seeds: Vec<String>,
}
