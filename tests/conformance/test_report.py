"""The comparison itself, on made-up reports: no network, no suite."""

from types import SimpleNamespace

import pytest

from . import report
from .report import Recorder, behind, table


def recorded(*reports: tuple[str, str, str]) -> Recorder:
    recorder = Recorder()
    for test, outcome, reason in reports:
        recorder.pytest_runtest_logreport(
            SimpleNamespace(
                nodeid=f"suite.py::{test}",
                when="setup" if reason == "at setup" else "call",
                outcome=outcome,
                passed=outcome == "passed",
                skipped=outcome == "skipped",
                longrepr=("suite.py", 1, f"Skipped: {reason}"),
            )
        )
    return recorder


@pytest.mark.parametrize("ours", ["failed", "skipped", "missing"])
def test_what_deepseek_v3_alone_passes_is_named(ours):
    reports = [("DeepseekV3::test_a", "passed", ""), ("DeepseekV3::test_b", "passed", "")]
    reports += [("NanoDeepSeek::test_b", "passed", "")]
    if ours != "missing":
        reports += [("NanoDeepSeek::test_a", "passed", ""), ("NanoDeepSeek::test_a", ours, "a subtest")]
    recorder = recorded(*reports)
    assert behind(recorder) == (["test_a"], [], [])
    assert f"  test_a ({ours})" in table(recorder)


def test_both_skip_or_fail_is_no_difference():
    both = [("test_skip", "skipped"), ("test_fail", "failed"), ("test_pass", "passed")]
    recorder = recorded(*((f"{family}::{t}", o, "why") for family in ("NanoDeepSeek", "DeepseekV3") for t, o in both))
    assert behind(recorder) == ([], [], [])
    assert f"DeepseekV3    {1:8}{1:8}{1:9}" in table(recorder)


def test_an_expected_difference_is_stale_once_ours_passes(monkeypatch):
    monkeypatch.setattr(report, "EXPECTED", {"test_a: no plan": "no plan yet", "test_b": "something else"})
    theirs = [("DeepseekV3::test_a", "passed", ""), ("DeepseekV3::test_b", "passed", "")]
    recorder = recorded(*theirs, ("NanoDeepSeek::test_a", "skipped", "no plan"), ("NanoDeepSeek::test_b", "passed", ""))
    assert behind(recorder) == ([], ["test_a"], ["test_b"])
    other = recorded(*theirs, ("NanoDeepSeek::test_a", "skipped", "no GPU"), ("NanoDeepSeek::test_b", "failed", ""))
    assert behind(other) == (["test_a"], ["test_b"], [])


def test_a_passed_setup_is_not_a_passed_test():
    recorder = recorded(("DeepseekV3::test_a", "passed", "at setup"), ("NanoDeepSeek::test_a", "failed", "at setup"))
    assert recorder.tests("DeepseekV3", "passed") == [] and recorder.outcome("NanoDeepSeek", "test_a") == "failed"
