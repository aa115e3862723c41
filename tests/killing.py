"""Work that is killed: in a forked process, by SIGKILL, at a change it makes to the file system."""

import os
import signal
import sys
from collections.abc import Callable

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def change(event: str, arguments: tuple) -> str | None:
    """A change of the file system in words, `os.rename a b`; None for events that are none."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = mode and set(mode) & set("wax+")
        if not writes and not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            return None
    elif event not in CHANGES:
        return None
    return " ".join((event, *(str(part) for part in arguments if isinstance(part, (str, os.PathLike)))))


def killed(work: Callable[[], object], when: Callable[[str], bool]) -> bool:
    """Runs `work` in a forked process that is killed before the first change that `when` is true of; whether it was.

    Raises AssertionError if the work fails by itself.
    """
    child = os.fork()
    if child == 0:

        def hook(event: str, arguments: tuple):
            words = change(event, arguments)
            if words is not None and when(words):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the work failed"
    return False


def at_change(number: int, folder) -> Callable[[str], bool]:
    """For `killed`: true of the n-th change below `folder`, counted from 0."""
    seen = iter(range(10**9))
    return lambda words: str(folder) in words and next(seen) == number
