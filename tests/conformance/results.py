#!/usr/bin/env python3
"""Turns the output of a suite (standard input) into lines "test<TAB>pass|fail|skip<TAB>seconds".

results.py go          test2json events
results.py librdkafka NUMBER [SUBTEST]   output of librdkafka's test-runner for one test number
results.py cargo       output of `cargo test` (libtest), test binaries told apart by their "Running" lines
"""
import json
import re
import sys

COLOURS = re.compile(r"\x1b\[[0-9;]*m|\x1b\(B")


def from_go(lines):
    found = {}
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        test = event.get("Test")
        if not test:
            continue
        action = event["Action"]
        if action in ("pass", "fail", "skip"):
            found[test] = (action, event.get("Elapsed", 0.0))
        elif action == "run":
            # A test that never ends has no other event.
            found.setdefault(test, ("fail", 0.0))
    return sorted((test, *result) for test, result in found.items())


def from_librdkafka(lines, number, subtest):
    words = {"PASSED": "pass", "FAILED": "fail", "SKIPPED": "skip", "RUNNING": "fail"}
    row = re.compile(r"^\|\s*(\S+)\s*\|\s*(\w+)\s*\|\s*([0-9.]+)s")
    started = re.compile(r"= Running test (\S+) =")
    suffix = f"/{subtest}" if subtest else ""
    found, begun = [], []
    for line in lines:
        line = COLOURS.sub("", line)
        match = row.match(line)
        if match and match[1].startswith(number) and match[2] in words:
            found.append((match[1] + suffix, words[match[2]], float(match[3])))
        elif (match := started.search(line)) and match[1].startswith(number):
            begun.append(match[1])
    # Crashed or cut off before the summary: whatever had begun did not end well.
    return found or [(test + suffix, "fail", 0.0) for test in begun or [number]]


def from_cargo(lines):
    running = re.compile(r"Running .*?/([A-Za-z0-9_]+)-[0-9a-f]+\)")
    result = re.compile(r"^test (\S+) \.\.\. (ok|FAILED|ignored)(?: <([0-9.]+)s>)?")
    words = {"ok": "pass", "FAILED": "fail", "ignored": "skip"}
    binary, found = "", []
    for line in lines:
        line = COLOURS.sub("", line)
        if match := running.search(line):
            binary = match[1]
        elif match := result.match(line):
            name = f"{binary}::{match[1]}" if binary else match[1]
            found.append((name, words[match[2]], float(match[3] or 0.0)))
    return found


def main():
    kind = sys.argv[1]
    lines = (raw.decode("utf-8", "replace") for raw in sys.stdin.buffer)
    if kind == "go":
        rows = from_go(lines)
    elif kind == "librdkafka":
        rows = from_librdkafka(lines, sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else "")
    elif kind == "cargo":
        rows = from_cargo(lines)
    else:
        sys.exit(__doc__)
    for test, outcome, seconds in rows:
        print(f"{test}\t{outcome}\t{seconds:.1f}")


if __name__ == "__main__":
    main()
