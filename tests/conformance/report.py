"""Runs the suite, compares ours with DeepseekV3, and says so: `make conformance`.

Arguments go to pytest: `python -m tests.conformance.report -n 2 -k test_training`. Ends with 0 if ours passes every
test that DeepseekV3 passes, but for those in `EXPECTED`, and with 1 otherwise.
"""

import importlib.metadata
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from .fetch import ROOT, fetch

OURS, THEIRS = "NanoDeepSeek", "DeepseekV3"

# What DeepseekV3 passes and ours does not, and why: pattern of "test: reason of the skip" -> our reason. An entry by
# name is an error too once ours passes that test.
EXPECTED = {
    # Of older releases alone; the newest runs both tests on ours.
    "Not a prioritized model": "before 5.23 a model's age is read from a copyright line, which our files do not have",
    "no standardized RoPE module": "before 5.23 only rotary modules built from a config and a device are looked at",
}


class Recorder:
    """A pytest plugin that keeps, for each family and test, its outcomes and the reasons of its skips.

    A test with subtests counts as failed if one of them fails, and as skipped if one of them is skipped.
    """

    def __init__(self):
        self.outcomes: dict[str, dict[str, set[str]]] = {OURS: defaultdict(set), THEIRS: defaultdict(set)}
        self.reasons: dict[str, str] = {}  # of ours

    def pytest_runtest_logreport(self, report):
        family, test = report.nodeid.split("::")[-2:]
        if report.when != "call" and report.passed:
            return
        self.outcomes[family][test].add(report.outcome)
        if family == OURS and report.skipped:
            path, line, reason = report.longrepr
            self.reasons[test] = reason.removeprefix("Skipped: ")

    def outcome(self, family: str, test: str) -> str:
        seen = self.outcomes[family].get(test, {"missing"})
        return next(outcome for outcome in ("missing", "failed", "skipped", "passed") if outcome in seen)

    def excuse(self, test: str) -> str | None:
        said = f"{test}: {self.reasons.get(test, '')}"
        return next((reason for pattern, reason in EXPECTED.items() if re.search(pattern, said)), None)

    def tests(self, family: str, *outcomes: str) -> list[str]:
        return sorted(test for test in self.outcomes[family] if self.outcome(family, test) in outcomes)


def behind(recorder: Recorder) -> tuple[list[str], list[str], list[str]]:
    """Tests that DeepseekV3 passes and ours does not: those not expected, those expected; and the stale patterns."""
    unexpected, expected = [], []
    for test in recorder.tests(THEIRS, "passed"):
        if recorder.outcome(OURS, test) != "passed":
            (expected if recorder.excuse(test) else unexpected).append(test)
    passing = recorder.tests(OURS, "passed")
    stale = [pattern for pattern in EXPECTED if any(re.search(pattern, test) for test in passing)]
    return unexpected, expected, stale


def table(recorder: Recorder) -> str:
    version = importlib.metadata.version("transformers")
    lines = [f"The common model tests of transformers {version}", ""]
    lines.append(f"{'':14}{'passed':>8}{'failed':>8}{'skipped':>9}")
    for family in (OURS, THEIRS):
        counts = Counter(recorder.outcome(family, test) for test in recorder.outcomes[family])
        lines.append(f"{family:14}{counts['passed']:8}{counts['failed']:8}{counts['skipped']:9}")

    def section(title: str, entries: list[str]):
        lines.extend(["", f"{title}:" if entries else f"{title}: none", *(f"  {entry}" for entry in entries)])

    def why(test: str) -> str:
        said = recorder.excuse(test) or recorder.reasons.get(test, "")
        return f"{test} ({recorder.outcome(OURS, test)}){': ' + said if said else ''}"

    unexpected, expected, stale = behind(recorder)
    section(f"{THEIRS} passes, {OURS} does not", [why(test) for test in unexpected])
    if expected:
        section("The same, for a known reason", [why(test) for test in expected])
    if stale:
        section("Passes, and is still listed in EXPECTED", stale)
    ahead = [test for test in recorder.tests(OURS, "passed") if recorder.outcome(THEIRS, test) != "passed"]
    section(f"{OURS} passes, {THEIRS} does not", [f"{test} ({recorder.outcome(THEIRS, test)})" for test in ahead])
    both = [test for test in recorder.tests(OURS, "failed") if recorder.outcome(THEIRS, test) != "passed"]
    section("Neither passes, ours fails", both)
    skipped = Counter(
        recorder.reasons[test] for test in recorder.tests(OURS, "skipped") if recorder.outcome(THEIRS, test) != "passed"
    )
    section("Skipped for both, by reason", [f"{count:3} {reason}" for reason, count in skipped.most_common()])
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    try:
        fetch()
    except RuntimeError as error:
        print(error)
        return 1
    # By the environment, because some tests start a pytest of their own: without the settings of our own tests, whose
    # strict markers do not know transformers'.
    os.environ["PYTEST_ADDOPTS"] = "-o addopts= -p no:warnings -p no:cacheprovider"
    os.chdir(ROOT)
    recorder = Recorder()
    suite = Path(__file__).with_name("suite.py").relative_to(ROOT)
    ended = pytest.main([str(suite), "-q", "--tb=short", *arguments], plugins=[recorder])
    if ended not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not recorder.tests(THEIRS, "passed"):
        print("The suite did not run to its end.")
        return 1
    print("\n" + table(recorder))
    unexpected, _, stale = behind(recorder)
    return 1 if unexpected or stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
