#!/usr/bin/env python3
"""Compares what two brokers answered to the same probes.

differential.py KAFKA.answers FLUMEN.answers [EXPECTED.tsv]   prints every difference that EXPECTED does not explain

Input is the output of `flumen-probe HOST:PORT`. Before comparing, what must differ is replaced: ids, ports, times, texts
of error messages (an error may have one or not, a success must not). EXPECTED has lines "probe pattern<TAB>reason".
Ends with status 1 when a difference remains.
"""
import difflib
import fnmatch
import re
import sys

UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
NIL = "00000000-0000-0000-0000-000000000000"
NOBODY = "deadbeef-0000-4000-8000-000000000001"
# Fields whose text is for people, possibly on the next line after Some( or inside quotes.
TEXTS = re.compile(r'((?:error_message|batch_index_error_message|documentation): )Some\(\s*"(?:[^"\\]|\\.)*",?\s*\)', re.S)
PORT = re.compile(r"(\bport: )\d+")
CLUSTER = re.compile(r'(cluster_id: (?:Some\(\s*)?)"[^"]*"', re.S)
PRODUCER = re.compile(r"(producer_id: ProducerId\(\s*)\d+(,?\s*\))", re.S)
MEMBER = re.compile(r'((?:member_id|leader): )"(?!")[^"]*"')
APPEND_TIME = re.compile(r"(log_append_time_ms: )\d+")
SIZES = re.compile(r"((?:partition_size|total_bytes|usable_bytes|offset_lag): )-?\d+")
DIRECTORY = re.compile(r'(log_dir: )"[^"]*"')
HOST = re.compile(r'(client_host: )"[^"]*"')
EPOCH = re.compile(r"((?:finalized_features_epoch|leader_epoch): )\d+")
# Configurations that only we have, whole entries of a list.
OWN_CONFIGS = re.compile(r'^( *)\w+ \{\n *name: "flumen\.[^"]*",\n.*?^\1\},\n', re.S | re.M)
# The leader epoch inside a batch of fetched records, between length and magic 2.
RECORD_EPOCH = re.compile(r"(`\\0\\0\\0)(?:\\0|\\x01)(\\x02)")
# Kafka's feature eligible.leader.replicas sets this one for the whole cluster, to the default.
MIN_INSYNC = re.compile(r'(name: "min\.insync\.replicas",\n(?:(?!name: ).*\n)*? *config_source: )3,')
EMPTY_LIST = re.compile(r"(aborted_transactions: )Some\(\s*\[\],\s*\)", re.S)


def uuid(match):
    return match[0] if match[0] in (NIL, NOBODY) else "<id>"


def with_any_text(answer):
    """An error may explain itself or not; only a success must not have a text."""
    code, lines = "0", []
    for line in answer.splitlines(True):
        if match := re.match(r"\s*error_code: (-?\d+),", line):
            code = match[1]
        if code != "0":
            line = re.sub(r"(error_message: ).*", r"\1<any>,", line)
        lines.append(line)
    return "".join(lines)


def normalise(answer):
    answer = UUID.sub(uuid, answer)
    # Kafka sends empty texts where nothing is to be said.
    answer = re.sub(r'(error_message: )Some\(\s*"(?:NONE)?",\s*\)', r"\1None", answer)
    answer = OWN_CONFIGS.sub("", answer)
    answer = MIN_INSYNC.sub(r"\g<1>5,", answer)
    answer = RECORD_EPOCH.sub(r"\1<epoch>\2", answer)
    answer = EMPTY_LIST.sub(r"\1None", answer)
    answer = with_any_text(TEXTS.sub(r"\1Some(<text>)", answer))
    for pattern, name in ((PORT, "port"), (APPEND_TIME, "time"), (SIZES, "size"), (EPOCH, "epoch")):
        answer = pattern.sub(rf"\1<{name}>", answer)
    for pattern, name in ((CLUSTER, "cluster"), (MEMBER, "member"), (DIRECTORY, "directory"), (HOST, "host")):
        answer = pattern.sub(rf'\1"<{name}>"', answer)
    return PRODUCER.sub(r"\1<producer>\2", answer)


def answers(path):
    found, name, lines = {}, None, []
    for line in open(path, encoding="utf-8"):
        if line.startswith("## "):
            if name:
                found[name] = normalise("".join(lines))
            name, lines = line[3:].strip(), []
        else:
            lines.append(line)
    if name:
        found[name] = normalise("".join(lines))
    return found


def main():
    kafka, flumen = answers(sys.argv[1]), answers(sys.argv[2])
    expected = []
    if len(sys.argv) > 3:
        for line in open(sys.argv[3], encoding="utf-8"):
            if line.strip() and not line.startswith("#"):
                pattern, reason = line.rstrip("\n").split("\t")
                expected.append([pattern, reason, 0])
    differing = {}
    explained = 0
    for name in kafka:
        if flumen.get(name) == kafka[name]:
            continue
        why = next((e for e in expected if fnmatch.fnmatchcase(name, e[0])), None)
        if why:
            why[2] += 1
            explained += 1
            continue
        delta = "".join(
            line
            for line in difflib.unified_diff(
                kafka[name].splitlines(True), flumen.get(name, "missing\n").splitlines(True), "kafka", "flumen", n=2
            )
            if not line.startswith(("---", "+++"))
        )
        # Many versions differ in the same way: shown once.
        probe, version = name.rsplit(" v", 1)
        differing.setdefault((probe, delta), []).append(version)
    for (probe, delta), versions in differing.items():
        print(f"## {probe} v{versions[0]}" + (f"..v{versions[-1]}" if len(versions) > 1 else ""))
        print(delta)
    for pattern, reason, count in expected:
        if not count:
            print(f"no longer differs: {pattern} ({reason})")
    same = len(kafka) - explained - sum(len(v) for v in differing.values())
    print(f"{len(kafka)} answers: {same} the same, {explained} differ as expected, {len(differing)} unexplained differences")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
