#!/usr/bin/env python3
"""Compares the results of a suite with what Apache Kafka passes and with what is expected to fail.

compare.py SUITE TARGET report RESULTS       summary; status 1 when something failed that was not expected to
compare.py SUITE TARGET unexpected RESULTS   the names of such tests, one a line
compare.py SUITE TARGET merge RESULTS AGAIN  takes over the passes of a second run
compare.py SUITE TARGET not-served           the reason why the whole suite is left out; status 1 when it is not
compare.py SUITE TARGET skip-pattern         a Go pattern of top-level tests that are expected to fail

SUITE.kafka.tsv: what Kafka gives (test, pass|fail|skip, seconds). SUITE.expected-fail.tsv: test (or a pattern with *),
reason. With TARGET kafka nothing is expected to fail but what failed before.
"""
import fnmatch
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
# Tests with time limits of their own tell little below this, in seconds.
SLOW_SECONDS = 5.0
SLOW_FACTOR = 3.0


def rows(path):
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.split("\t")


def results(path):
    return {r[0]: (r[1], float(r[2]) if len(r) > 2 and r[2] else 0.0) for r in rows(pathlib.Path(path))}


class Comparison:
    def __init__(self, suite, target):
        self.suite = suite
        self.kafka = results(HERE / f"{suite}.kafka.tsv")
        self.expected = [] if target == "kafka" else [(r[0], r[1]) for r in rows(HERE / f"{suite}.expected-fail.tsv")]

    def reason(self, test):
        for pattern, reason in self.expected:
            if fnmatch.fnmatchcase(test, pattern):
                return reason
        return None

    def unexpected(self, found):
        for test, (outcome, _) in self.kafka.items():
            if outcome == "pass" and found.get(test, ("missing",))[0] != "pass" and self.reason(test) is None:
                yield test

    def report(self, found):
        counts = {"pass": 0, "fail": 0, "skip": 0}
        for outcome, _ in found.values():
            counts[outcome] += 1
        unexpected = list(self.unexpected(found))
        expected = [
            test
            for test, (outcome, _) in self.kafka.items()
            if outcome == "pass" and found.get(test, ("missing",))[0] != "pass" and self.reason(test) is not None
        ]
        passing = [t for t in self.kafka if self.reason(t) is not None and found.get(t, ("",))[0] == "pass"]
        print(
            f"{self.suite}: {counts['pass']} pass, {counts['fail']} fail, {counts['skip']} skip;"
            f" {len(expected)} not served yet, {len(unexpected)} unexpected"
        )
        for test in unexpected:
            print(f"  UNEXPECTED {test}: {found.get(test, ('missing',))[0]}, Kafka passes it")
        for test in passing:
            print(f"  passes although expected to fail: {test}")
        for test, (outcome, seconds) in found.items():
            control = self.kafka.get(test, ("", 0.0))[1]
            if outcome == "pass" and control and seconds > SLOW_SECONDS and seconds > SLOW_FACTOR * control:
                print(f"  slow: {test} took {seconds} s, with Kafka {control} s")
        return not unexpected


def write(path, found):
    lines = (f"{test}\t{outcome}\t{seconds:.1f}\n" for test, (outcome, seconds) in found.items())
    pathlib.Path(path).write_text("".join(lines))


def main():
    suite, target, what, *arguments = sys.argv[1:]
    comparison = Comparison(suite, target)
    if what == "report":
        sys.exit(0 if comparison.report(results(arguments[0])) else 1)
    elif what == "unexpected":
        for test in comparison.unexpected(results(arguments[0])):
            print(test)
    elif what == "merge":
        found, again = results(arguments[0]), results(arguments[1])
        for test, result in again.items():
            if result[0] == "pass" or test not in found:
                found[test] = result
        write(arguments[0], found)
    elif what == "not-served":
        whole = [reason for pattern, reason in comparison.expected if pattern == "*"]
        if not whole:
            sys.exit(1)
        print(whole[0])
    elif what == "skip-pattern":
        names = sorted({p for p, _ in comparison.expected if "/" not in p and "*" not in p})
        print(f"^({'|'.join(names)})$" if names and comparison.suite == "franz-go" else "")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
