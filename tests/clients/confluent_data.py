"""confluent-kafka: codecs, sizes, isolation levels, kinds of rebalance. Usage: confluent_data.py BOOTSTRAP"""
import os
import sys

from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

bootstrap = sys.argv[1]
admin = AdminClient({"bootstrap.servers": bootstrap})
MIB = 1 << 20


def create(name, partitions, **config):
    made = admin.create_topics([NewTopic(name, partitions, 1, config={k.replace("_", "."): v for k, v in config.items()})])
    made[name].result()


def send(topic, values, **settings):
    """Sends to partition 0; the names of what went wrong."""
    errors = []
    producer = Producer({"bootstrap.servers": bootstrap, "message.max.bytes": 20 * MIB, "linger.ms": 20, **settings})
    for value in values:
        producer.produce(topic, value, partition=0, on_delivery=lambda e, m: errors.append(e.name()) if e else None)
        producer.poll(0)
    producer.flush()
    return errors


def read(topic, count, **settings):
    config = {"bootstrap.servers": bootstrap, "group.id": "reader", "enable.partition.eof": True, "check.crcs": True, **settings}
    consumer = Consumer(config)
    consumer.assign([TopicPartition(topic, 0, 0)])
    values = []
    while len(values) < count:
        for message in consumer.consume(500, timeout=1.0):
            if message.error():
                assert message.error().code() == KafkaError._PARTITION_EOF, message.error()
            else:
                values.append(message.value())
    consumer.close()
    return values


# Every codec, batches of many small records and of one large one, and a record that does not shrink.
small = [f"{i:06}".encode() * 10 for i in range(2000)]
large = [bytes([i]) * (900 << 10) for i in range(4)] + [os.urandom(600 << 10)]
for codec in ["none", "gzip", "snappy", "lz4", "zstd"]:
    topic = f"codec-{codec}"
    create(topic, 1)
    for idempotence in [False, True]:
        assert send(topic, small + large, **{"compression.codec": codec, "enable.idempotence": idempotence}) == []
    for isolation in ["read_uncommitted", "read_committed"]:
        assert read(topic, 2 * len(small + large), **{"isolation.level": isolation}) == 2 * (small + large), (codec, isolation)

# A topic may take more than the broker's default, or less; what is too large is refused for good and the rest goes on.
create("wide", 1, max_message_bytes=str(9 * MIB))
huge = os.urandom(8 * MIB)
assert send("wide", [huge, b"after"]) == []
assert read("wide", 2) == [huge, b"after"]
# Less than the record is asked for: it comes alone all the same.
assert read("wide", 2, **{"fetch.message.max.bytes": 1000, "fetch.max.bytes": 20 * MIB}) == [huge, b"after"]
assert send("wide", [os.urandom(10 * MIB)]) == ["MSG_SIZE_TOO_LARGE"]
create("narrow", 1, max_message_bytes="1000")
for idempotence in [False, True]:
    assert send("narrow", [b"x" * 2000], **{"enable.idempotence": idempotence}) == ["MSG_SIZE_TOO_LARGE"]
assert send("narrow", [b"fits"]) == []
# The limit counts what travels, not what it holds.
assert send("narrow", [b"x" * 20000], **{"compression.codec": "zstd"}) == []
assert send("codec-none", [os.urandom(2 * MIB)]) == ["MSG_SIZE_TOO_LARGE"]
# Whatever compression.type a topic has, what is read is what was sent.
create("stored", 1, compression_type="zstd")
assert send("stored", small, **{"compression.codec": "gzip"}) == []
assert read("stored", len(small)) == small


class Member:
    """A consumer of `shared` that notes every change of its partitions."""

    def __init__(self, group, name, **settings):
        self.name, self.log = name, []
        self.consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": group,
                "client.id": name,
                "auto.offset.reset": "earliest",
                "session.timeout.ms": 45000,
                "heartbeat.interval.ms": 100,
                **settings,
            }
        )
        self.consumer.subscribe(
            ["shared"],
            on_assign=lambda c, parts: self.log.append(("assigned", sorted(p.partition for p in parts))),
            on_revoke=lambda c, parts: self.log.append(("revoked", sorted(p.partition for p in parts))),
            on_lost=lambda c, parts: self.log.append(("lost", sorted(p.partition for p in parts))),
        )

    def held(self):
        return sorted(p.partition for p in self.consumer.assignment())


def until(members, condition):
    while not condition():
        for member in members:
            message = member.consumer.poll(0.05)
            assert message is None or not message.error(), message.error()


create("shared", 4)

# Cooperative: whoever was there keeps what it need not give.
cooperative = {"partition.assignment.strategy": "cooperative-sticky"}
a = Member("coop", "a", **cooperative)
until([a], lambda: a.held() == [0, 1, 2, 3])
b = Member("coop", "b", **cooperative)
until([a, b], lambda: len(a.held()) == 2 and len(b.held()) == 2)
assert sorted(a.held() + b.held()) == [0, 1, 2, 3]
given = [parts for what, parts in a.log if what == "revoked"]
assert given == [b.held()], (a.log, b.log)
assert not any(what == "lost" for what, _ in a.log + b.log)
b.consumer.close()
until([a], lambda: a.held() == [0, 1, 2, 3])
# The others were never given up.
assert [parts for what, parts in a.log if what == "revoked"] == given, a.log
a.consumer.close()

# Static: a member that comes back under its name within the session finds its partitions, and nobody else is disturbed.
c = Member("static", "c", **{"group.instance.id": "one"})
d = Member("static", "d", **{"group.instance.id": "two"})
until([c, d], lambda: len(c.held()) == 2 and len(d.held()) == 2)
held, quiet = d.held(), len(c.log)
d.consumer.close()
d = Member("static", "d", **{"group.instance.id": "two"})
until([c, d], lambda: d.held() == held)
assert len(c.log) == quiet, c.log
members = admin.describe_consumer_groups(["static"])["static"].result().members
assert sorted(m.group_instance_id for m in members) == ["one", "two"]
# A second of the same name takes over, and the first is told.
e = Member("static", "e", **{"group.instance.id": "two"})
fenced = []


def told():
    c.consumer.poll(0.05)
    e.consumer.poll(0.05)
    message = d.consumer.poll(0.05)
    if message is not None and message.error():
        fenced.append(message.error())
    return bool(fenced) and e.held() == held


until([], told)
assert fenced[0].code() == KafkaError._FATAL and "fenced" in fenced[0].str(), fenced
for member in (c, d, e):
    member.consumer.close()
print("confluent data ok")
