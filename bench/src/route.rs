//! Which broker leads which partitions of a topic: whom a producer and a consumer talk to.
//!
//! Asked once, before a load begins. A load whose leaders move meanwhile counts the refusals as errors.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::client::Client;

/// A broker, and the partitions that it leads.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    pub address: String,
    pub partitions: Vec<u32>,
}

/// One route for each broker that leads something. A broker that is alone is asked where it was found, whatever it
/// says that its address is.
pub async fn routes(bootstrap: &str, topic: &str, partitions: usize) -> Result<Vec<Route>> {
    let mut control = Client::connect(bootstrap).await?;
    let (brokers, leaders) = control.leaders(topic, partitions).await?;
    if brokers.len() < 2 {
        return Ok(vec![Route {
            address: bootstrap.to_string(),
            partitions: (0..partitions as u32).collect(),
        }]);
    }
    let mut by_leader: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    for (partition, leader) in leaders.iter().enumerate() {
        by_leader.entry(leader).or_default().push(partition as u32);
    }
    let route = |(address, partitions): (&str, _)| Route { address: address.to_string(), partitions };
    Ok(by_leader.into_iter().map(route).collect())
}

/// The offset of each partition of a topic at `at` ([`crate::client::EARLIEST`] or [`crate::client::LATEST`]), each asked of
/// its leader.
pub async fn offsets(bootstrap: &str, topic: &str, partitions: usize, at: i64) -> Result<Vec<i64>> {
    let mut all = vec![0; partitions];
    for route in routes(bootstrap, topic, partitions).await? {
        let mut leader = Client::connect(&route.address).await?;
        let offsets = leader.offsets(topic, &route.partitions, at).await?;
        for (partition, offset) in route.partitions.iter().zip(offsets) {
            all[*partition as usize] = offset;
        }
    }
    Ok(all)
}
