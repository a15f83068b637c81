//! Coordinators, members, committed offsets.

use anyhow::ensure;
use bytes::Bytes;
use kafka_protocol::messages::join_group_request::JoinGroupRequestProtocol;
use kafka_protocol::messages::leave_group_request::MemberIdentity;
use kafka_protocol::messages::offset_commit_request::{
    OffsetCommitRequestPartition, OffsetCommitRequestTopic,
};
use kafka_protocol::messages::offset_delete_request::{
    OffsetDeleteRequestPartition, OffsetDeleteRequestTopic,
};
use kafka_protocol::messages::offset_fetch_request::{
    OffsetFetchRequestGroup, OffsetFetchRequestTopic, OffsetFetchRequestTopics,
};
use kafka_protocol::messages::{
    DeleteGroupsRequest, DescribeGroupsRequest, FindCoordinatorRequest, GroupId, HeartbeatRequest,
    JoinGroupRequest, LeaveGroupRequest, ListGroupsRequest, OffsetCommitRequest, OffsetDeleteRequest,
    OffsetFetchRequest, SyncGroupRequest,
};

use super::{Bed, Probes, shown};
use crate::wire::{Wire, text, topic_name};

const JOIN: (i16, i16) = (0, 9);
const COMMIT: (i16, i16) = (2, 9);
const FETCH: (i16, i16) = (1, 9);

fn group(name: &str) -> GroupId {
    GroupId(text(name))
}

/// Asks for a coordinator until there is one: the first time this makes the topic of committed offsets.
pub fn make_offsets_topic(bed: &Bed) -> anyhow::Result<()> {
    let mut wire = bed.wire()?;
    loop {
        let answer = wire.ask(2, &FindCoordinatorRequest::default().with_key(text("g")))?;
        match answer.error_code {
            0 => return Ok(()),
            14..=16 => std::thread::yield_now(),
            code => anyhow::bail!("no coordinator: {code}"),
        }
    }
}

fn find(version: i16, keys: &[&str], kind: i8) -> FindCoordinatorRequest {
    let request = FindCoordinatorRequest::default();
    let request = if version >= 1 { request.with_key_type(kind) } else { request };
    if version >= 4 {
        request.with_coordinator_keys(keys.iter().map(|k| text(k)).collect())
    } else {
        request.with_key(text(keys[0]))
    }
}

fn join(version: i16, name: &str, member: &str) -> JoinGroupRequest {
    let request = JoinGroupRequest::default()
        .with_group_id(group(name))
        .with_session_timeout_ms(30_000)
        .with_member_id(text(member))
        .with_protocol_type(text("consumer"))
        .with_protocols(vec![
            JoinGroupRequestProtocol::default()
                .with_name(text("range"))
                .with_metadata(Bytes::from_static(&[0; 10])),
        ]);
    if version >= 1 { request.with_rebalance_timeout_ms(30_000) } else { request }
}

/// A member of a group of its own, joined and synced. Returns its id and generation.
fn member(wire: &mut Wire, name: &str) -> anyhow::Result<(String, i32)> {
    let first = wire.ask(9, &join(9, name, ""))?;
    let id = first.member_id.to_string();
    let joined = wire.ask(9, &join(9, name, &id))?;
    ensure!(joined.error_code == 0, "join of {name}: {}", joined.error_code);
    let sync = SyncGroupRequest::default()
        .with_group_id(group(name))
        .with_member_id(text(&id))
        .with_generation_id(joined.generation_id);
    let synced = wire.ask(3, &sync)?;
    ensure!(synced.error_code == 0, "sync of {name}: {}", synced.error_code);
    Ok((id, joined.generation_id))
}

fn commit(
    name: &str,
    member: &str,
    generation: i32,
    topic: &str,
    partition: i32,
    metadata: Option<&str>,
) -> OffsetCommitRequest {
    OffsetCommitRequest::default()
        .with_group_id(group(name))
        .with_member_id(text(member))
        .with_generation_id_or_member_epoch(generation)
        .with_topics(vec![OffsetCommitRequestTopic::default().with_name(topic_name(topic)).with_partitions(
            vec![
            OffsetCommitRequestPartition::default()
                .with_partition_index(partition)
                .with_committed_offset(7)
                .with_committed_metadata(metadata.map(text)),
        ],
        )])
}

fn fetch(version: i16, name: &str, topics: Option<&[(&str, &[i32])]>) -> OffsetFetchRequest {
    if version >= 8 {
        let topics = topics.map(|list| {
            list.iter()
                .map(|(topic, partitions)| {
                    OffsetFetchRequestTopics::default()
                        .with_name(topic_name(topic))
                        .with_partition_indexes(partitions.to_vec())
                })
                .collect()
        });
        return OffsetFetchRequest::default().with_groups(vec![
            OffsetFetchRequestGroup::default().with_group_id(group(name)).with_topics(topics),
        ]);
    }
    let topics = topics.map(|list| {
        list.iter()
            .map(|(topic, partitions)| {
                OffsetFetchRequestTopic::default()
                    .with_name(topic_name(topic))
                    .with_partition_indexes(partitions.to_vec())
            })
            .collect()
    });
    OffsetFetchRequest::default().with_group_id(group(name)).with_topics(topics)
}

fn heartbeat(name: &str, member: &str, generation: i32) -> HeartbeatRequest {
    HeartbeatRequest::default()
        .with_group_id(group(name))
        .with_member_id(text(member))
        .with_generation_id(generation)
}

fn sync(name: &str, member: &str, generation: i32) -> SyncGroupRequest {
    SyncGroupRequest::default()
        .with_group_id(group(name))
        .with_member_id(text(member))
        .with_generation_id(generation)
}

fn leave(version: i16, name: &str, members: &[(&str, Option<&str>)]) -> LeaveGroupRequest {
    let request = LeaveGroupRequest::default().with_group_id(group(name));
    if version <= 2 {
        return request.with_member_id(text(members[0].0));
    }
    let identity = |(member, instance): &(&str, Option<&str>)| {
        MemberIdentity::default().with_member_id(text(member)).with_group_instance_id(instance.map(text))
    };
    request.with_members(members.iter().map(identity).collect())
}

fn delete_offsets(name: &str, topic: &str, partitions: &[i32]) -> OffsetDeleteRequest {
    let partitions =
        partitions.iter().map(|p| OffsetDeleteRequestPartition::default().with_partition_index(*p)).collect();
    OffsetDeleteRequest::default().with_group_id(group(name)).with_topics(vec![
        OffsetDeleteRequestTopic::default().with_name(topic_name(topic)).with_partitions(partitions),
    ])
}

pub fn add(probes: &mut Probes) {
    probes.exchange("FindCoordinator/group", (0, 6), |bed: &mut Bed, version| {
        make_offsets_topic(bed)?;
        bed.ask(version, &find(version, &["g"], 0))
    });
    probes.one("FindCoordinator/empty key", (0, 6), |_, version| find(version, &[""], 0));
    probes.one("FindCoordinator/several", (4, 6), |_, version| find(version, &["g", "h", "", "g"], 0));
    probes.one("FindCoordinator/none", (4, 6), |_, version| find(version, &[], 0));
    probes.one("FindCoordinator/key type 9", (1, 6), |_, version| find(version, &["g"], 9));

    probes.exchange("JoinGroup/first", JOIN, |bed, version| {
        let mut wire = bed.wire()?;
        wire.send(version, &join(version, &format!("first-{version}"), ""))?;
        shown::<JoinGroupRequest>(&mut wire, version)
    });
    probes.exchange("JoinGroup/with the given id", (4, 9), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("given-{version}");
        let id = wire.ask(version, &join(version, &name, ""))?.member_id.to_string();
        wire.send(version, &join(version, &name, &id))?;
        shown::<JoinGroupRequest>(&mut wire, version)
    });
    probes.exchange("JoinGroup/static", (5, 9), |bed, version| {
        let mut wire = bed.wire()?;
        let request =
            join(version, &format!("static-{version}"), "").with_group_instance_id(Some(text("one")));
        wire.send(version, &request)?;
        shown::<JoinGroupRequest>(&mut wire, version)
    });
    probes.one("JoinGroup/unknown member", JOIN, |_, version| join(version, "nobody", "who"));
    probes.one("JoinGroup/empty group", JOIN, |_, version| join(version, "", ""));
    for timeout in [1, 5_999, 1_800_001, -1] {
        probes.one(&format!("JoinGroup/session timeout {timeout}"), JOIN, move |_, version| {
            join(version, "timed", "").with_session_timeout_ms(timeout)
        });
    }
    probes.one("JoinGroup/no protocols", JOIN, |_, version| {
        join(version, "bare", "").with_protocols(Vec::new())
    });
    probes.one("JoinGroup/no protocol type", JOIN, |_, version| {
        join(version, "bare", "").with_protocol_type(text(""))
    });
    for name in ["", "no name!", ".."] {
        probes.one(&format!("JoinGroup/instance id '{name}'"), (5, 9), move |_, version| {
            join(version, &format!("instance-{version}-{name}"), "").with_group_instance_id(Some(text(name)))
        });
    }
    probes.exchange("JoinGroup/other protocol than the group", JOIN, |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("ranged-{version}");
        member(&mut wire, &name)?;
        let mut odd = join(version, &name, "");
        odd.protocols[0].name = text("sticky");
        let answer = bed.ask(version, &odd)?;
        Ok(answer)
    });

    probes.one("SyncGroup/unknown group", (0, 5), |_, _| sync("nobody", "who", 1));
    probes.one("SyncGroup/empty group", (0, 5), |_, _| sync("", "who", 1));
    probes.exchange("SyncGroup/wrong generation", (0, 5), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("synced-{version}");
        let (id, generation) = member(&mut wire, &name)?;
        bed.ask(version, &sync(&name, &id, generation + 1))
    });
    probes.exchange("SyncGroup/unknown member", (0, 5), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("synced-again-{version}");
        let (_, generation) = member(&mut wire, &name)?;
        bed.ask(version, &sync(&name, "who", generation))
    });
    probes.exchange("SyncGroup/wrong protocol", (5, 5), |bed, version| {
        let mut wire = bed.wire()?;
        let (id, generation) = member(&mut wire, "synced-oddly")?;
        let request = sync("synced-oddly", &id, generation);
        bed.ask(
            version,
            &request.with_protocol_type(Some(text("consumer"))).with_protocol_name(Some(text("sticky"))),
        )
    });
    probes.exchange("SyncGroup/protocol only in part", (5, 5), |bed, version| {
        let mut wire = bed.wire()?;
        let (id, generation) = member(&mut wire, "synced-in-part")?;
        bed.ask(version, &sync("synced-in-part", &id, generation))
    });

    probes.one("Heartbeat/unknown group", (0, 4), |_, _| heartbeat("nobody", "who", 1));
    probes.one("Heartbeat/empty group", (0, 4), |_, _| heartbeat("", "who", 1));
    for (what, shift) in [("right", 0), ("wrong generation", 1), ("old generation", -1)] {
        probes.exchange(&format!("Heartbeat/{what}"), (0, 4), move |bed, version| {
            let mut wire = bed.wire()?;
            let name = format!("beating-{version}-{shift}");
            let (id, generation) = member(&mut wire, &name)?;
            bed.ask(version, &heartbeat(&name, &id, generation + shift))
        });
    }
    probes.exchange("Heartbeat/unknown member", (0, 4), |bed, version| {
        let mut wire = bed.wire()?;
        let (_, generation) = member(&mut wire, &format!("beating-{version}"))?;
        bed.ask(version, &heartbeat(&format!("beating-{version}"), "who", generation))
    });
    probes.exchange("Heartbeat/unknown instance", (3, 4), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("beating-static-{version}");
        let (id, generation) = member(&mut wire, &name)?;
        bed.ask(version, &heartbeat(&name, &id, generation).with_group_instance_id(Some(text("who"))))
    });

    probes.one("LeaveGroup/unknown group", (0, 5), |_, version| leave(version, "nobody", &[("who", None)]));
    probes.one("LeaveGroup/empty group", (0, 5), |_, version| leave(version, "", &[("who", None)]));
    probes.one("LeaveGroup/nobody", (3, 5), |_, version| leave(version, "nobody", &[]));
    probes.exchange("LeaveGroup/member", (0, 5), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("left-{version}");
        let (id, _) = member(&mut wire, &name)?;
        bed.ask(version, &leave(version, &name, &[(&id, None)]))
    });
    probes.exchange("LeaveGroup/member and others", (3, 5), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("left-with-others-{version}");
        let (id, _) = member(&mut wire, &name)?;
        bed.ask(version, &leave(version, &name, &[("who", None), (&id, None), ("", Some("what"))]))
    });

    probes.one("DescribeGroups/unknown", (0, 6), |_, _| {
        DescribeGroupsRequest::default().with_groups(vec![group("nobody")])
    });
    probes.one("DescribeGroups/empty name", (0, 6), |_, _| {
        DescribeGroupsRequest::default().with_groups(vec![group("")])
    });
    probes.one("DescribeGroups/none", (0, 6), |_, _| DescribeGroupsRequest::default());
    probes.exchange("DescribeGroups/stable", (0, 6), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("described-{version}");
        member(&mut wire, &name)?;
        bed.ask(version, &DescribeGroupsRequest::default().with_groups(vec![group(&name)]))
    });
    probes.exchange("DescribeGroups/authorized operations", (3, 6), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("described-operations-{version}");
        member(&mut wire, &name)?;
        let request = DescribeGroupsRequest::default()
            .with_groups(vec![group(&name)])
            .with_include_authorized_operations(true);
        bed.ask(version, &request)
    });
    probes.exchange("DescribeGroups/left by all", (0, 6), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("described-left-{version}");
        let (id, _) = member(&mut wire, &name)?;
        wire.ask(5, &leave(5, &name, &[(&id, None)]))?;
        bed.ask(version, &DescribeGroupsRequest::default().with_groups(vec![group(&name)]))
    });
    probes.exchange("ListGroups/states", (4, 5), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("listed-{version}");
        member(&mut wire, &name)?;
        let mut seen = Vec::new();
        for state in ["Stable", "stable", "Empty", "NoSuchState"] {
            let answer =
                wire.ask(version, &ListGroupsRequest::default().with_states_filter(vec![text(state)]))?;
            let listed = answer.groups.iter().find(|g| g.group_id.as_str() == "listed-5");
            seen.push(format!(
                "error_code: {},\n{state}: {:?}",
                answer.error_code,
                listed.map(|g| g.group_state.to_string())
            ));
        }
        Ok(seen.join("\n"))
    });
    probes.exchange("ListGroups/types", (5, 5), |bed, version| {
        let mut wire = bed.wire()?;
        let mut seen = Vec::new();
        for kind in ["classic", "Classic", "consumer", "nosuchtype"] {
            let answer =
                wire.ask(version, &ListGroupsRequest::default().with_types_filter(vec![text(kind)]))?;
            let listed = answer.groups.iter().find(|g| g.group_id.as_str() == "listed-5");
            seen.push(format!(
                "error_code: {},\n{kind}: {:?}",
                answer.error_code,
                listed.map(|g| g.group_type.to_string())
            ));
        }
        Ok(seen.join("\n"))
    });
    probes.exchange("DeleteGroups/unknown, empty, busy and twice", (0, 2), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("busy-{version}");
        member(&mut wire, &name)?;
        let mut seen = Vec::new();
        for names in [&["nobody"][..], &[""], &[&name], &[]] {
            let request =
                DeleteGroupsRequest::default().with_groups_names(names.iter().map(|n| group(n)).collect());
            seen.push(bed.ask(version, &request)?);
        }
        Ok(seen.join("\n"))
    });
    probes.exchange("DeleteGroups/with offsets", (0, 2), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("deleted-{version}");
        wire.ask(8, &commit(&name, "", -1, "plain", 0, None))?;
        bed.ask(version, &DeleteGroupsRequest::default().with_groups_names(vec![group(&name)]))
    });

    probes.one("OffsetCommit/without a group", COMMIT, |_, v| {
        commit(&format!("simple-{v}"), "", -1, "plain", 0, Some("meta"))
    });
    probes.one("OffsetCommit/null metadata", COMMIT, |_, _| commit("simple", "", -1, "plain", 0, None));
    probes.one("OffsetCommit/long metadata", COMMIT, |_, _| {
        commit("simple", "", -1, "plain", 0, Some(&"m".repeat(4097)))
    });
    probes.one("OffsetCommit/longest metadata", COMMIT, |_, _| {
        commit("simple", "", -1, "plain", 0, Some(&"m".repeat(4096)))
    });
    probes.one("OffsetCommit/unknown topic", COMMIT, |_, _| commit("simple", "", -1, "nowhere", 0, None));
    probes.one("OffsetCommit/unknown partition", COMMIT, |_, _| commit("simple", "", -1, "plain", 3, None));
    probes.one("OffsetCommit/partition -1", COMMIT, |_, _| commit("simple", "", -1, "plain", -1, None));
    probes.one("OffsetCommit/empty group", COMMIT, |_, _| commit("", "", -1, "plain", 0, None));
    probes.one("OffsetCommit/generation of an unknown group", COMMIT, |_, _| {
        commit("nobody", "who", 1, "plain", 0, None)
    });
    probes.one("OffsetCommit/no topics", COMMIT, |_, _| {
        let mut request = commit("simple", "", -1, "plain", 0, None);
        request.topics.clear();
        request
    });
    probes.one("OffsetCommit/no partitions", COMMIT, |_, _| {
        let mut request = commit("simple", "", -1, "plain", 0, None);
        request.topics[0].partitions.clear();
        request
    });
    probes.one("OffsetCommit/known and unknown together", COMMIT, |_, _| {
        let mut request = commit("simple", "", -1, "plain", 0, None);
        request.topics.extend(commit("simple", "", -1, "nowhere", 0, None).topics);
        let more = commit("simple", "", -1, "plain", 9, None).topics[0].partitions.clone();
        request.topics[0].partitions.extend(more);
        request
    });
    for (what, who, shift) in [
        ("member", "", 0),
        ("wrong generation", "", 1),
        ("unknown member", "who", 0),
        ("no generation", "", -9),
    ] {
        probes.exchange(&format!("OffsetCommit/{what}"), COMMIT, move |bed, version| {
            let mut wire = bed.wire()?;
            let name = format!("committing-{version}-{shift}-{who}");
            let (id, generation) = member(&mut wire, &name)?;
            let generation = if shift == -9 { -1 } else { generation + shift };
            let id = if shift == -9 {
                ""
            } else if who.is_empty() {
                &id
            } else {
                who
            };
            bed.ask(version, &commit(&name, id, generation, "plain", 0, None))
        });
    }

    probes.one("OffsetFetch/unknown group", FETCH, |_, version| {
        fetch(version, "nobody", Some(&[("plain", &[0, 9])]))
    });
    probes.one("OffsetFetch/empty group", FETCH, |_, version| fetch(version, "", Some(&[("plain", &[0])])));
    probes.one("OffsetFetch/unknown topic", FETCH, |_, version| {
        fetch(version, "nobody", Some(&[("nowhere", &[0])]))
    });
    probes.one("OffsetFetch/no topics", FETCH, |_, version| fetch(version, "nobody", Some(&[])));
    probes.one("OffsetFetch/all of an unknown group", (2, 9), |_, version| fetch(version, "nobody", None));
    probes.exchange("OffsetFetch/committed", FETCH, |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("fetching-{version}");
        wire.ask(8, &commit(&name, "", -1, "plain", 0, Some("meta")))?;
        bed.ask(version, &fetch(version, &name, Some(&[("plain", &[0, 1]), ("empty", &[0])])))
    });
    probes.exchange("OffsetFetch/all committed", (2, 9), |bed, version| {
        let mut wire = bed.wire()?;
        let name = format!("fetching-all-{version}");
        wire.ask(8, &commit(&name, "", -1, "plain", 0, Some("meta")))?;
        bed.ask(version, &fetch(version, &name, None))
    });
    probes.one("OffsetFetch/several groups", (8, 9), |_, version| {
        let mut request = fetch(version, "nobody", Some(&[("plain", &[0])]));
        request.groups.extend(fetch(version, "", None).groups);
        request.groups.extend(fetch(version, "fetching-all-9", None).groups);
        request
    });
    probes.one("OffsetFetch/no groups", (8, 9), |_, _| OffsetFetchRequest::default());

    let only = (0, 0);
    probes.one("OffsetDelete/unknown group", only, |_, _| delete_offsets("nobody", "plain", &[0]));
    probes.one("OffsetDelete/empty group", only, |_, _| delete_offsets("", "plain", &[0]));
    probes.exchange("OffsetDelete/committed and not", only, |bed, version| {
        let mut wire = bed.wire()?;
        wire.ask(8, &commit("forgetting", "", -1, "plain", 0, None))?;
        bed.ask(version, &delete_offsets("forgetting", "plain", &[0, 1, 9]))
    });
    probes.exchange("OffsetDelete/unknown topic", only, |bed, version| {
        let mut wire = bed.wire()?;
        wire.ask(8, &commit("forgetting", "", -1, "plain", 0, None))?;
        bed.ask(version, &delete_offsets("forgetting", "nowhere", &[0]))
    });
    probes.exchange("OffsetDelete/no topics", only, |bed, version| {
        bed.ask(version, &OffsetDeleteRequest::default().with_group_id(group("forgetting")))
    });
}
