"""Work that is killed: in a forked process, by SIGKILL, at the n-th change it makes to the file system."""

import os
import signal
import sys
from collections.abc import Callable

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def is_change(event: str, arguments: tuple) -> bool:
    if event != "open":
        return event in CHANGES
    mode, flags = arguments[1], arguments[2]
    return bool(mode and set(mode) & set("wax+")) or bool(isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR))


def changes(work: Callable[[], object], folder, kill_at: int | None = None) -> int | None:
    """How many changes below `folder` a forked process makes that runs `work`; None if it was killed at the n-th.

    The n-th change (from 0) is not made any more. Raises AssertionError if `work` fails.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        made = 0

        def hook(event: str, arguments: tuple):
            nonlocal made
            if is_change(event, arguments) and any(str(folder) in str(part) for part in arguments):
                if made == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                made += 1

        sys.addaudithook(hook)
        try:
            work()
            os.write(write, str(made).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        counted = answer.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL and kill_at is not None
        return None
    assert counted, "the work failed"
    return int(counted)
