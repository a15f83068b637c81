//! Frames there and back, their bytes, and what is done with bytes that are no frames.

#[path = "../../../protocol/tests/support/counting_allocator.rs"]
mod counting_allocator;

use bytes::{Bytes, BytesMut};
use counting_allocator::peak_of;
use flumen_peer::{
    Answer, BODY_MAX, CatchUp, CatchUpState, DecodeError, Frame, FrameError, HELLO_BODY_MAX, Hello, Lead,
    RaftFrame, Refusal, RefusalCode, Request, cut_frame,
};
use flumen_raft::{Body, Entry, Membership, Message};
use proptest::prelude::*;

fn joined(segments: &[Bytes]) -> BytesMut {
    let mut all = BytesMut::new();
    segments.iter().for_each(|s| all.extend_from_slice(s));
    all
}

fn back(frame: &Frame) -> Frame {
    let mut input = joined(&frame.encode(1));
    let raw = cut_frame(&mut input, BODY_MAX).unwrap().unwrap();
    assert!(input.is_empty());
    Frame::decode(raw).unwrap()
}

fn raft(items: &[(u64, Message)]) -> RaftFrame {
    let mut frame = RaftFrame::new(1, 2);
    items.iter().for_each(|(group, message)| assert!(frame.push(*group, message)));
    frame
}

fn items_of(frame: Frame) -> Result<Vec<(u64, Message)>, DecodeError> {
    match frame {
        Frame::Raft(raft) => raft.items().collect(),
        other => panic!("{other:?}"),
    }
}

fn heartbeat(term: u64, commit: u64) -> Message {
    Message { from: 1, to: 2, term, body: Body::Heartbeat { commit, read: None, sleep: false } }
}

fn hello() -> Hello {
    Hello {
        cluster_id: *b"0123456789abcdef",
        node_id: 3,
        boot_id: 0x0102_0304_0506_0708,
        version_min: 1,
        version_max: 2,
        finalized_version: 1,
        format: 5,
        shard: 3,
        address: "a:33145".to_owned(),
    }
}

#[test]
fn the_bytes_are_these() {
    let hex = |frame: Frame| joined(&frame.encode(1)).iter().map(|b| format!("{b:02x}")).collect::<String>();
    assert_eq!(hex(Frame::Alive { sequence: 300 }), "464c505203000001000000023b9a5cd3ac02");
    let items = [(7, heartbeat(5, 9)), (8, heartbeat(5, 200))];
    assert_eq!(hex(Frame::Raft(raft(&items))), "464c5052040000010000000d18f5a870010201020e0a0009020000c801");
    assert_eq!(
        hex(Frame::Hello(hello())),
        concat!(
            "464c50520100000000000033f5a5304130313233343536373839616263646566",
            "00000000000000030102030405060708000100020001000500030007613a3333",
            "313435"
        )
    );
}

#[test]
fn heartbeats_of_many_groups_take_a_few_bytes_each() {
    let items: Vec<_> = (0..1000).map(|g| (g * 3 + 1, heartbeat(4 + g % 3, 100_000 + g))).collect();
    let frame = Frame::Raft(raft(&items));
    let bytes = joined(&frame.encode(1)).len();
    assert!(bytes <= 1000 * 6 + 32, "{bytes}");
    assert_eq!(items_of(back(&frame)).unwrap(), items);
}

#[test]
fn payloads_are_copied_neither_out_nor_in() {
    let batch = Bytes::from(vec![9; 100_000]);
    let entry = |index| Entry { index, term: 3, data: batch.clone(), is_membership: false };
    let body = Body::Append { prev_index: 4, prev_term: 3, commit: 2, entries: vec![entry(5), entry(6)] };
    let frame = Frame::Raft(raft(&[(1, Message { from: 1, to: 2, term: 3, body })]));
    let (segments, used) = peak_of(|| frame.encode(1));
    assert_eq!(segments.iter().filter(|s| s.as_ptr() == batch.as_ptr()).count(), 2);
    assert!(used < 10_000, "{used}");
    let mut input = joined(&segments);
    let raw = cut_frame(&mut input, BODY_MAX).unwrap().unwrap();
    let inside = raw.body.as_ptr_range();
    let (items, used) = peak_of(|| items_of(Frame::decode(raw).unwrap()).unwrap());
    assert!(used < 10_000, "{used}");
    let Body::Append { entries, .. } = &items[0].1.body else { panic!() };
    assert!(entries.iter().all(|e| inside.contains(&e.data.as_ptr()) && e.data == batch));
}

#[test]
fn other_frames_come_back_as_they_were() {
    let Frame::Hello(hello_back) = back(&Frame::Hello(hello())) else { panic!() };
    assert_eq!(hello_back, hello());
    for code in [
        RefusalCode::OtherCluster,
        RefusalCode::SameNode,
        RefusalCode::Version,
        RefusalCode::UnknownNode,
        RefusalCode::Plain,
    ] {
        let refusal = Refusal { code, sentence: "upgrade \u{e9}".to_owned() };
        let Frame::Refusal(refusal_back) = back(&Frame::Refusal(refusal.clone())) else { panic!() };
        assert_eq!(refusal_back, refusal);
    }
    let catch_up = CatchUp { group: 9, state: CatchUpState::Done, index: 1 << 40, end_index: u64::MAX };
    let Frame::CatchUp(catch_up_back) = back(&Frame::CatchUp(catch_up)) else { panic!() };
    assert_eq!(catch_up_back, catch_up);
    let leads = vec![
        Lead { group: 9, epoch: 1, lagging: vec![] },
        Lead { group: 7, epoch: 1 << 31, lagging: vec![2, 300] },
    ];
    let Frame::Leads(leads_back) = back(&Frame::Leads(leads.clone())) else { panic!() };
    assert_eq!(leads_back, leads);
    let request = Request { id: 77, kind: 19, body: Bytes::from(vec![1; 5000]) };
    let Frame::Request(request_back) = back(&Frame::Request(request.clone())) else { panic!() };
    assert_eq!(request_back, request);
    let answer = Answer { id: 77, code: -1, body: Bytes::new() };
    let Frame::Answer(answer_back) = back(&Frame::Answer(answer.clone())) else { panic!() };
    assert_eq!(answer_back, answer);
}

#[test]
fn whoever_is_no_broker_is_known_by_the_first_bytes() {
    // An ApiVersions request of a Kafka client, an HTTP request, a TLS hello, one byte.
    let kafka: &[u8] = &[0, 0, 0, 24, 0, 18, 0, 3, 0, 0, 0, 1, 0, 4, b't', b'e', b's', b't'];
    for stranger in [kafka, &kafka[..1], b"GET / HTTP/1.1\r\n", &[0x16, 3, 1, 2, 0], b"FLPX"] {
        assert_eq!(cut_frame(&mut BytesMut::from(stranger), HELLO_BODY_MAX), Err(FrameError::NotAPeer));
    }
    // The largest request that Kafka brokers take by default, and the largest that could be configured.
    for len in [100 << 20, i32::MAX] {
        let mut input = BytesMut::from(&(len as u32).to_be_bytes()[..]);
        assert_eq!(cut_frame(&mut input, BODY_MAX), Err(FrameError::NotAPeer));
    }
}

#[test]
fn a_frame_comes_in_pieces_and_a_damaged_one_is_refused() {
    let good = joined(&Frame::Hello(hello()).encode(0));
    for cut in 0..good.len() {
        assert_eq!(cut_frame(&mut BytesMut::from(&good[..cut]), HELLO_BODY_MAX), Ok(None), "{cut}");
    }
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            // A longer length waits for bytes that never come; all else is noticed.
            let cut = cut_frame(&mut bad, HELLO_BODY_MAX);
            assert!(cut.is_err() || (cut == Ok(None) && (8..12).contains(&at)), "{at} {bit} {cut:?}");
        }
    }
    let mut large = BytesMut::from(&b"FLPR\x04\0\0\x01\xff\xff\xff\xff\0\0\0\0"[..]);
    let limit = HELLO_BODY_MAX;
    let refused = Err(FrameError::TooLarge { len: u32::MAX as usize, limit });
    assert_eq!(cut_frame(&mut large, limit), refused);
}

#[test]
fn a_full_frame_says_so() {
    let batch = Bytes::from(vec![0; 30 << 20]);
    let entry = Entry { index: 1, term: 1, data: batch, is_membership: false };
    let body = Body::Append { prev_index: 0, prev_term: 0, commit: 0, entries: vec![entry] };
    let message = Message { from: 1, to: 2, term: 1, body };
    let mut frame = RaftFrame::new(1, 2);
    assert!(frame.push(1, &message) && frame.push(2, &message));
    assert!(!frame.push(3, &message));
}

fn id() -> impl Strategy<Value = u64> {
    prop_oneof![1u64..100, Just(u64::MAX), any::<u64>()]
}

fn data() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        proptest::collection::vec(any::<u8>(), 1000..1100),
    ]
    .prop_map(Bytes::from)
}

fn body() -> impl Strategy<Value = Body> {
    let entries = proptest::collection::vec((id(), data(), any::<bool>()), 0..6);
    let append = (0u64..1 << 40, id(), id(), entries).prop_map(|(prev_index, prev_term, commit, entries)| {
        let entries = (prev_index + 1..)
            .zip(entries)
            .map(|(index, (term, data, is_membership))| Entry { index, term, data, is_membership })
            .collect();
        Body::Append { prev_index, prev_term, commit, entries }
    });
    let read = || proptest::option::of(id());
    prop_oneof![
        append,
        (id(), read(), any::<bool>()).prop_map(|(commit, read, sleep)| Body::Heartbeat {
            commit,
            read,
            sleep
        }),
        (id(), read()).prop_map(|(commit, read)| Body::HeartbeatAnswer { commit, read }),
        (id(), id()).prop_map(|(index, commit)| Body::AppendAccepted { index, commit }),
        (id(), id(), id(), id()).prop_map(|(index, hint_index, hint_term, commit)| Body::AppendRejected {
            index,
            hint_index,
            hint_term,
            commit
        }),
        (any::<bool>(), any::<bool>(), id(), id(), id(), id()).prop_map(
            |(pre, forced, last_index, last_term, commit, commit_term)| Body::VoteRequest {
                pre,
                forced,
                last_index,
                last_term,
                commit,
                commit_term
            }
        ),
        (any::<bool>(), any::<bool>(), id(), id()).prop_map(|(pre, granted, commit, commit_term)| {
            Body::VoteAnswer { pre, granted, commit, commit_term }
        }),
        Just(Body::TimeoutNow),
        (id(), id(), data()).prop_map(|(index, term, data)| Body::Snapshot {
            index,
            term,
            membership: Membership { voters: vec![1, 2, 9], learners: vec![4], ..Membership::default() },
            data
        }),
    ]
}

fn messages() -> impl Strategy<Value = Vec<(u64, Message)>> {
    let message =
        (id(), id(), body()).prop_map(|(group, term, body)| (group, Message { from: 1, to: 2, term, body }));
    proptest::collection::vec(message, 0..20)
}

/// What decoding may take: entries are larger in memory than their least form on the wire, and come one message at a time.
fn allowed(input: usize) -> usize {
    input * 12 + 4096
}

fn decode_all(mut input: BytesMut) {
    let len = input.len();
    let (_, used) = peak_of(|| {
        while let Ok(Some(raw)) = cut_frame(&mut input, BODY_MAX) {
            if let Ok(Frame::Raft(raft)) = Frame::decode(raw) {
                raft.items().for_each(drop);
            }
        }
    });
    assert!(used <= allowed(len), "{len} bytes took {used}");
}

/// With a right checksum, as a foe would send it.
fn framed(kind: u8, body: &[u8]) -> BytesMut {
    let mut frame = BytesMut::from(&b"FLPR"[..]);
    frame.extend_from_slice(&[kind, 0, 0, 1]);
    frame.extend_from_slice(&(body.len() as u32).to_be_bytes());
    let checksum = crc32c_of(&frame, body);
    frame.extend_from_slice(&checksum.to_be_bytes());
    frame.extend_from_slice(body);
    frame
}

fn crc32c_of(header: &[u8], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header), body)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn messages_come_back_as_they_were(items in messages()) {
        let frame = Frame::Raft(raft(&items));
        prop_assert_eq!(items_of(back(&frame)), Ok(items));
    }

    #[test]
    fn changed_frames_neither_panic_nor_take_memory(
        items in messages(),
        changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..6),
        end in any::<u16>(),
    ) {
        let encoded = joined(&Frame::Raft(raft(&items)).encode(1));
        let mut body = encoded[16..].to_vec();
        for (at, value) in changes {
            let at = usize::from(at) % body.len();
            body[at] = value;
        }
        body.truncate(body.len() - usize::from(end) % body.len() / 8);
        decode_all(framed(4, &body));
    }

    #[test]
    fn any_bytes_neither_panic_nor_take_memory(kind in 0u8..10, body in proptest::collection::vec(any::<u8>(), 0..300)) {
        decode_all(framed(kind, &body));
        decode_all(BytesMut::from(&body[..]));
    }
}

#[test]
fn counts_that_lie_take_no_memory() {
    // from 1, to 2, one append of group 1: previous index and term, commit, then 65,536 entries that are not there.
    let lie = framed(4, &[1, 2, 3, 1, 2, 2, 0, 0, 0, 0x80, 0x80, 4]);
    decode_all(lie);
    // As many of the smallest entries as claimed: the worst that may happen.
    let mut body = vec![1, 2, 3, 1, 2, 2, 0, 0, 0, 0x80, 0x80, 4];
    body.extend(std::iter::repeat_n([0u8; 6], 65_536).flatten());
    let len = body.len();
    let (count, used) = peak_of(|| {
        let mut input = framed(4, &body);
        let raw = cut_frame(&mut input, BODY_MAX).unwrap().unwrap();
        items_of(Frame::decode(raw).unwrap()).unwrap().len()
    });
    assert_eq!(count, 1);
    assert!(used <= allowed(len), "{len} {used}");
}
