//! The port for brokers, and what must not come in there: clients, garbage, strangers, and members that talk nonsense.

use std::io::{Read, Write};
use std::net::TcpStream;

use bytes::{Bytes, BytesMut};
use flumen_peer::{
    Answer, BODY_MAX, Frame, HEADER_BYTES, Hello, Lead, RaftFrame, RefusalCode, Request, cut_frame,
};
use flumen_raft::{Body, Message};
use flumen_tests::clock::Clock;
use flumen_tests::cluster::Cluster;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use serde_json::{Value, json};

const KAFKA: u16 = 2;
const CHANGE: u16 = 3;
const HAND_OVER: u16 = 6;
/// Node 1 in Raft.
const NODE: u64 = 2;
const STRANGER: u64 = 10;

struct Peer {
    stream: TcpStream,
    input: BytesMut,
}

impl Peer {
    fn connect(address: &str) -> Peer {
        Peer { stream: TcpStream::connect(address).unwrap(), input: BytesMut::new() }
    }

    fn send(&mut self, bytes: &[u8]) {
        // The other side may have closed it for what came before.
        let _ = self.stream.write_all(bytes);
    }

    fn say(&mut self, frame: &Frame, version: u16) {
        frame.encode(version).iter().for_each(|segment| self.send(segment));
    }

    /// The next frame that is no sign of life; none when the other side closed.
    fn hear(&mut self) -> Option<Frame> {
        loop {
            if let Some(raw) = cut_frame(&mut self.input, BODY_MAX).unwrap() {
                match Frame::decode(raw).unwrap() {
                    Frame::Alive { .. } => continue,
                    frame => return Some(frame),
                }
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) | Err(_) => return None,
                Ok(n) => self.input.extend_from_slice(&buffer[..n]),
            }
        }
    }

    fn answer(&mut self) -> Answer {
        match self.hear() {
            Some(Frame::Answer(answer)) => answer,
            other => panic!("{other:?}"),
        }
    }

    /// Everything until the other side closes.
    fn rest(mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset is a close, too.
        let _ = self.stream.read_to_end(&mut rest);
        rest
    }
}

fn hello(cluster_id: [u8; 16], raft_id: u64, boot_id: u64) -> Hello {
    Hello {
        cluster_id,
        node_id: raft_id,
        boot_id,
        version_min: 1,
        version_max: 1,
        finalized_version: 0,
        format: 2,
        shard: 0,
        address: "127.0.0.1:1".to_string(),
    }
}

/// What the port says of itself to one that names no cluster, and the bytes of the cluster's id.
fn who(address: &str) -> (Value, [u8; 16]) {
    let mut peer = Peer::connect(address);
    peer.say(&Frame::Hello(hello([0; 16], STRANGER, 1)), 0);
    assert!(matches!(peer.hear(), Some(Frame::Hello(_))));
    peer.say(&Frame::Request(Request { id: 1, kind: 1, body: Bytes::new() }), 1);
    let presence: Value = serde_json::from_slice(&peer.answer().body).unwrap();
    let text = presence["state"]["Member"]["cluster_id"].as_str().unwrap().to_string();
    (presence, decode_id(&text))
}

fn decode_id(text: &str) -> [u8; 16] {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let digits = text.bytes().map(|c| ALPHABET.iter().position(|a| *a == c).unwrap() as u128);
    let bits = digits
        .enumerate()
        .fold(0u128, |bits, (i, digit)| bits | if i < 21 { digit << (122 - 6 * i) } else { digit >> 4 });
    bits.to_be_bytes()
}

fn check_serves(cluster: &Cluster) {
    let node = cluster.any().unwrap();
    assert_eq!(node.get("/v1/status/ready").unwrap()["status"], json!("ready"));
    let partitions = node.get("/v1/cluster/partitions?topic=t").unwrap();
    let all = partitions["partitions"].as_array().unwrap();
    assert!(all.len() == 4 && all.iter().all(|p| p["leader"] == 1), "{partitions}");
}

fn epochs(cluster: &Cluster) -> Vec<i64> {
    let partitions = cluster.any().unwrap().get("/v1/cluster/partitions?topic=t").unwrap();
    let all = partitions["partitions"].as_array().unwrap();
    all.iter().map(|p| p["leader_epoch"].as_i64().unwrap()).collect()
}

fn started() -> (tempfile::TempDir, Cluster, String) {
    let dir = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(dir.path(), 1, &[]).unwrap();
    cluster.create_topic("t", 4, 1, &json!({})).unwrap();
    let address =
        cluster.any().unwrap().get("/v1/brokers").unwrap()[0]["rpc_address"].as_str().unwrap().to_string();
    (dir, cluster, address)
}

#[test]
fn what_is_no_broker_gets_no_byte_and_does_no_harm() {
    let (_dir, cluster, address) = started();
    let said = |bytes: &[u8]| {
        let mut peer = Peer::connect(&address);
        peer.send(bytes);
        peer.rest()
    };
    assert!(said(b"GET / HTTP/1.0\r\n\r\n").is_empty());
    // ApiVersions, version 0.
    assert!(said(&[0, 0, 0, 10, 0, 18, 0, 0, 0, 0, 0, 1, 255, 255]).is_empty());
    let mut rng = StdRng::seed_from_u64(1);
    let whole: Vec<u8> = Frame::Hello(hello([7; 16], STRANGER, 1)).encode(0).concat();
    for round in 0..300 {
        let mut bytes = vec![0; rng.random_range(1..200)];
        rng.fill_bytes(&mut bytes);
        if round % 3 == 0 {
            // Almost a hello.
            bytes = whole.clone();
            let at = rng.random_range(0..bytes.len());
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        if round % 3 == 1 && bytes.len() >= HEADER_BYTES {
            // A header that promises more than anything may have.
            bytes[..8].copy_from_slice(&whole[..8]);
            bytes[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
        }
        // Some wait for more that never comes, until this side closes.
        let mut peer = Peer::connect(&address);
        peer.send(&bytes);
        let _ = peer.stream.shutdown(std::net::Shutdown::Write);
        assert!(peer.rest().is_empty(), "{bytes:?}");
    }
    // Many that say nothing are not waited for for ever.
    let silent: Vec<Peer> = (0..100).map(|_| Peer::connect(&address)).collect();
    assert_eq!(who(&address).0["node_id"], json!(1));
    for peer in silent {
        assert!(peer.rest().is_empty());
    }
    check_serves(&cluster);
}

#[test]
fn strangers_are_refused_in_words() {
    let (_dir, cluster, address) = started();
    let (_, id) = who(&address);
    let refused = |theirs: Hello| {
        let mut peer = Peer::connect(&address);
        peer.say(&Frame::Hello(theirs), 0);
        match peer.hear() {
            Some(Frame::Refusal(refusal)) => {
                assert!(peer.rest().is_empty(), "nothing is said to one that was refused");
                (refusal.code, refusal.sentence)
            }
            other => panic!("{other:?}"),
        }
    };
    let (code, sentence) = refused(hello([9; 16], STRANGER, 5));
    assert!(code == RefusalCode::OtherCluster && sentence.contains("--seeds"), "{sentence}");
    let (code, sentence) = refused(hello(id, NODE, 5));
    assert!(code == RefusalCode::SameNode && sentence.contains("--node-id"), "{sentence}");
    let (code, sentence) = refused(Hello { version_min: 77, version_max: 78, ..hello(id, STRANGER, 5) });
    assert!(code == RefusalCode::Version && sentence.contains("upgrade"), "{sentence}");
    let (code, _) = refused(hello(id, u64::MAX, 5));
    assert_eq!(code, RefusalCode::UnknownNode);

    // One process comes in under an id, byte by byte, another does not as long as it is there.
    let mut first = Peer::connect(&address);
    for byte in Frame::Hello(hello(id, STRANGER, 5)).encode(0).concat() {
        first.send(&[byte]);
    }
    assert!(matches!(first.hear(), Some(Frame::Hello(_))));
    let (code, sentence) = refused(hello(id, STRANGER, 6));
    assert!(code == RefusalCode::SameNode && sentence.contains("node 9"), "{sentence}");
    drop(first);
    loop {
        let mut next = Peer::connect(&address);
        next.say(&Frame::Hello(hello(id, STRANGER, 6)), 0);
        match next.hear() {
            Some(Frame::Hello(_)) => break,
            Some(Frame::Refusal(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    check_serves(&cluster);
}

#[test]
fn a_member_that_talks_nonsense_is_cut_off_or_ignored() {
    let (_dir, cluster, address) = started();
    let (_, id) = who(&address);
    let before = epochs(&cluster);
    let mut boot_id = 100;
    let mut come_in = || loop {
        boot_id += 1;
        let mut peer = Peer::connect(&address);
        peer.say(&Frame::Hello(hello(id, STRANGER, boot_id)), 0);
        match peer.hear() {
            Some(Frame::Hello(_)) => return peer,
            // The connection before is not gone yet.
            Some(Frame::Refusal(_)) => {}
            other => panic!("{other:?}"),
        }
    };
    let raft = |from, to, message: Body| {
        let mut frame = RaftFrame::new(from, to);
        for group in 0..6 {
            assert!(frame.push(group, &Message { from, to, term: 1000, body: message.clone() }));
        }
        Frame::Raft(frame)
    };
    let vote = Body::VoteRequest {
        pre: false,
        forced: true,
        last_index: 1 << 40,
        last_term: 999,
        commit: 0,
        commit_term: 0,
    };
    // Nobody of this cluster: no vote, no leadership, no term of it counts. What it asks is answered behind that.
    let mut peer = come_in();
    peer.say(&raft(STRANGER, NODE, vote.clone()), 1);
    peer.say(&raft(STRANGER, NODE, Body::Heartbeat { commit: 1 << 40, read: None, sleep: true }), 1);
    peer.say(&raft(STRANGER, NODE, Body::TimeoutNow), 1);
    for (kind, body) in [
        (KAFKA, &b"nonsense"[..]),
        (KAFKA, b""),
        (CHANGE, b""),
        (CHANGE, b"\x02{\"DeleteTopic\":{\"topic\":\"t\"}}"),
        (CHANGE, b"\x02{\"DeleteTopic\":"),
        (CHANGE, b"\x00{\"CreateTopic\":{\"name\":7}}"),
        (HAND_OVER, b"x"),
        (HAND_OVER, &[255; 16]),
        (999, b"?"),
    ] {
        peer.say(&Frame::Request(Request { id: u64::from(kind), kind, body: Bytes::from_static(body) }), 1);
        let answer = peer.answer();
        assert!(answer.id == u64::from(kind) && answer.code != 0, "{kind}: {answer:?}");
    }
    assert_eq!(epochs(&cluster), before);

    // What makes no sense from anybody ends the connection.
    let nonsense = [
        raft(3, NODE, vote.clone()),
        raft(STRANGER, 3, vote),
        Frame::Leads(vec![Lead { group: 1, epoch: u64::MAX, lagging: vec![] }]),
        Frame::Hello(hello(id, STRANGER, 1)),
        Frame::Answer(Answer { id: 1, code: 0, body: Bytes::new() }),
    ];
    for frame in nonsense {
        let mut peer = come_in();
        peer.say(&frame, 1);
        assert!(peer.hear().is_none(), "{frame:?}");
    }
    let mut rng = StdRng::seed_from_u64(2);
    for _ in 0..200 {
        let mut body = vec![0; rng.random_range(0..60)];
        rng.fill_bytes(&mut body);
        // A whole frame with a right checksum, of any kind.
        let mut raw: Vec<u8> =
            Frame::Request(Request { id: 1, kind: 1, body: Bytes::from(body) }).encode(1).concat();
        raw[4] = rng.random_range(0..12);
        let sum = crc(&raw);
        raw[12..16].copy_from_slice(&sum.to_be_bytes());
        let mut peer = come_in();
        peer.send(&raw);
        let _ = peer.stream.shutdown(std::net::Shutdown::Write);
        while peer.hear().is_some() {}
    }
    assert_eq!(epochs(&cluster), before);
    check_serves(&cluster);
    cluster.create_topic("after", 1, 1, &json!({})).unwrap();
}

fn crc(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..12]), &frame[HEADER_BYTES..])
}

/// Regression: members that had just started did not know the nodes yet, and a founder with an empty directory took its part
/// again, as though it had never voted.
#[test]
fn a_founder_without_its_log_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(dir.path(), 3, &[]).unwrap();
    cluster.create_topic("t", 1, 3, &json!({})).unwrap();
    cluster.stop_all().unwrap();
    std::fs::remove_dir_all(&cluster.nodes[2].data_dir).unwrap();
    // Its directory is gone, and at first only one other runs.
    let [first, second, lost] = &mut cluster.nodes[..] else { panic!("three nodes") };
    std::thread::scope(|scope| {
        let early = scope.spawn(|| first.restart());
        let ended = scope.spawn(|| lost.restart_or_end());
        while std::net::TcpStream::connect(&second.kafka).is_err() && !early.is_finished() {
            if !second.is_running() {
                second.restart().unwrap();
            }
        }
        early.join().unwrap().unwrap();
        assert!(ended.join().unwrap().unwrap().is_some_and(|status| !status.success()));
    });
    cluster.await_leaders("t").unwrap();
    // Nor does one whose log alone is gone.
    cluster.stop_all().unwrap();
    let log = cluster.nodes[1].data_dir.join("data").join("log");
    std::fs::remove_dir_all(&log).unwrap();
    assert!(cluster.nodes[1].restart_or_end().unwrap().is_some_and(|status| !status.success()));
}

/// Regression: whoever starts a cluster waited for ever for nodes that waited for one which had ended.
#[test]
fn a_cluster_of_which_a_node_ends_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("n2").join("data");
    std::fs::create_dir_all(data.parent().unwrap()).unwrap();
    std::fs::write(&data, "not a directory").unwrap();
    let error = format!("{:#}", Cluster::start(dir.path(), 3, &[]).err().unwrap());
    assert!(error.contains("node 2") && error.contains(data.to_str().unwrap()), "{error}");
}

#[test]
fn a_clock_far_from_the_others_is_refused_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let clocks = [1, 2, 3].map(|id| Clock::new(dir.path(), &format!("n{id}")).unwrap());
    let of_node = |at: usize| clocks[at].environment().to_vec();
    let mut cluster = Cluster::start_each_in(dir.path(), 3, &[], of_node, None).unwrap();
    cluster.create_topic("t", 1, 3, &json!({})).unwrap();
    // One that would join.
    let late = Clock::new(dir.path(), "late").unwrap();
    let mut stranger = cluster.stranger(4, &[]);
    stranger.environment = late.environment().to_vec();
    late.set_ahead_ms(-3_600_000).unwrap();
    assert!(stranger.restart_or_end().unwrap().is_some_and(|status| !status.success()));
    assert!(stranger.log().contains("behind that of the broker at"), "{}", stranger.log());
    late.set_ahead_ms(0).unwrap();
    stranger.restart().unwrap();
    cluster.nodes.push(stranger);
    // A member whose clock jumps goes on, and so do its clients; its health says so until the clock is right.
    let is_said = |cluster: &Cluster| {
        let health = cluster.nodes[0].get("/v1/cluster/health").unwrap();
        health["problems"]
            .as_array()
            .unwrap()
            .iter()
            .any(|p| p["code"] == "CLOCKS_APART" && p["node_id"] == 2)
    };
    assert!(!is_said(&cluster));
    clocks[1].set_ahead_ms(3_600_000).unwrap();
    assert!(is_said(&cluster));
    cluster.create_topic("u", 3, 3, &json!({})).unwrap();
    cluster.nodes[1].kill_9();
    cluster.nodes[1].restart().unwrap();
    cluster.create_topic("v", 3, 3, &json!({})).unwrap();
    clocks[1].set_ahead_ms(0).unwrap();
    assert!(!is_said(&cluster));
}
