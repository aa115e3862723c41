"""What is kept of a measurement."""

import sys

from benchmarks.collect import command


def test_the_command_is_kept_as_it_was_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/learning_race.py", "--racers", "ours", "--folder", "a b"])
    assert command("learning_race") == "python -m benchmarks.learning_race --racers ours --folder 'a b'"
