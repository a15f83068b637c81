//! A network of its own for the nodes of a cluster: a network namespace for each, a bridge between them, and cuts that
//! nobody is told of. Needs the right to make namespaces and `ip`; where there is none, says so.
//!
//! The test itself, with its clients, is on the bridge. A cut from one node to another gives the sender a wrong hardware
//! address for the receiver: what it sends goes nowhere, silently and in that direction only, as when a switch loses it. All
//! that is made here has names with this process's id, and goes when the handle goes.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::ensure;

/// Nodes of one network; their addresses end in their position plus one.
const NODES_MAX: usize = 8;
/// Whose address this is, nobody is.
const NOBODY: &str = "02:00:00:00:00:01";
/// The bridge itself, where clients are.
const OUTSIDE: u8 = 254;
const DEVICE: &str = "eth0";

pub struct Network {
    bridge: String,
    spaces: Vec<String>,
    /// The second and third number of the addresses.
    subnet: (u32, u32),
    /// Cuts that are in force: from a space to a last number, or from the outside to one.
    cuts: Vec<(Option<usize>, u8)>,
    slowed: Vec<usize>,
}

impl Network {
    /// `None`, and a line that says why, where no network can be made.
    pub fn new(nodes: usize) -> Option<Network> {
        assert!(nodes <= NODES_MAX, "{nodes} nodes are more than a test needs");
        // Tests of one process may run at the same time.
        static MADE: AtomicU32 = AtomicU32::new(0);
        let (id, number) = (std::process::id(), MADE.fetch_add(1, Ordering::Relaxed) % 10);
        let mut network = Network {
            bridge: format!("fl{id}x{number}"),
            spaces: Vec::new(),
            subnet: (213 + number, id % 250),
            cuts: Vec::new(),
            slowed: Vec::new(),
        };
        match network.make(nodes) {
            Ok(()) => Some(network),
            Err(error) => {
                println!("no network namespaces can be made here ({error:#}): this part was not run");
                None
            }
        }
    }

    fn make(&mut self, nodes: usize) -> anyhow::Result<()> {
        let bridge = self.bridge.clone();
        ip(&["link", "add", &bridge, "type", "bridge"])?;
        ip(&["addr", "add", &format!("{}/24", self.outside()), "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        for at in 0..nodes {
            let (space, port) = (format!("{bridge}n{at}"), format!("{bridge}p{at}"));
            ip(&["netns", "add", &space])?;
            self.spaces.push(space.clone());
            ip(&["link", "add", &port, "type", "veth", "peer", "name", DEVICE, "netns", &space])?;
            ip(&["link", "set", &port, "master", &bridge])?;
            ip(&["link", "set", &port, "up"])?;
            ip(&["-n", &space, "addr", "add", &format!("{}/24", self.address(at)), "dev", DEVICE])?;
            ip(&["-n", &space, "link", "set", DEVICE, "up"])?;
            ip(&["-n", &space, "link", "set", "lo", "up"])?;
        }
        Ok(())
    }

    fn host(&self, last: u8) -> String {
        format!("10.{}.{}.{last}", self.subnet.0, self.subnet.1)
    }

    /// Of the node at this position.
    pub fn address(&self, at: usize) -> String {
        self.host(last_of(at))
    }

    /// Where the test is, as nodes see it.
    pub fn outside(&self) -> String {
        self.host(OUTSIDE)
    }

    /// What a command line begins with that is to run there.
    pub fn inside(&self, at: usize) -> Vec<String> {
        ["ip", "netns", "exec", &self.spaces[at]].map(str::to_string).to_vec()
    }

    pub fn nodes(&self) -> usize {
        self.spaces.len()
    }

    /// Nothing that `from` sends arrives at `to` any more.
    pub fn cut_one_way(&mut self, from: usize, to: usize) -> anyhow::Result<()> {
        self.cut(Some(from), last_of(to))
    }

    /// Neither hears of the other.
    pub fn cut_between(&mut self, one: usize, other: usize) -> anyhow::Result<()> {
        self.cut_one_way(one, other)?;
        self.cut_one_way(other, one)
    }

    /// No other node hears of this one, nor it of them; clients still do.
    pub fn cut_from_nodes(&mut self, at: usize) -> anyhow::Result<()> {
        (0..self.nodes()).filter(|other| *other != at).try_for_each(|other| self.cut_between(at, other))
    }

    /// Nobody hears of this node, nor it of anybody.
    pub fn isolate(&mut self, at: usize) -> anyhow::Result<()> {
        self.cut_from_nodes(at)?;
        self.cut(Some(at), OUTSIDE)?;
        self.cut(None, last_of(at))
    }

    fn cut(&mut self, from: Option<usize>, to: u8) -> anyhow::Result<()> {
        let to_host = self.host(to);
        let neighbour = ["neigh", "replace", &to_host, "lladdr", NOBODY, "nud", "permanent", "dev"];
        match from {
            Some(at) => ip(&[&["-n", &self.spaces[at]], &neighbour[..], &[DEVICE]].concat())?,
            None => ip(&[&neighbour[..], &[&self.bridge]].concat())?,
        }
        self.cuts.push((from, to));
        Ok(())
    }

    /// What this node sends leaves at so many KiB a second.
    pub fn slow(&mut self, at: usize, kib_per_s: u32) -> anyhow::Result<()> {
        let rate = format!("{}kbit", u64::from(kib_per_s) * 8);
        let limit = ["qdisc", "replace", "dev", DEVICE, "root", "tbf", "rate", &rate];
        let bucket = ["burst", "16kb", "latency", "200ms"];
        run("tc", &[&["-n", &self.spaces[at]], &limit[..], &bucket[..]].concat())?;
        self.slowed.push(at);
        Ok(())
    }

    /// Everybody hears of everybody, at any speed.
    pub fn heal(&mut self) -> anyhow::Result<()> {
        for (from, to) in std::mem::take(&mut self.cuts) {
            let host = self.host(to);
            let gone = ["neigh", "del", &host, "dev"];
            // Two cuts may have been the same.
            let _ = match from {
                Some(at) => ip(&[&["-n", &self.spaces[at]], &gone[..], &[DEVICE]].concat()),
                None => ip(&[&gone[..], &[&self.bridge]].concat()),
            };
        }
        for at in std::mem::take(&mut self.slowed) {
            run("tc", &["-n", &self.spaces[at], "qdisc", "del", "dev", DEVICE, "root"])?;
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // A veth goes with its namespace, once no process is left in it.
        for space in &self.spaces {
            let _ = ip(&["netns", "del", space]);
        }
        let _ = ip(&["link", "del", &self.bridge]);
    }
}

fn last_of(at: usize) -> u8 {
    u8::try_from(at + 1).expect("a network has few nodes")
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    run("ip", arguments)
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program).args(arguments).output()?;
    let why = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), why.trim());
    Ok(())
}
