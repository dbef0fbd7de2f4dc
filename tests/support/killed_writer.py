"""A process that is killed while it writes and removes bases, again and again; prints what it left, as JSON.

``python killed_writer.py FOLDER TIMES SEED``: first at each of its calls of the file system in turn, then TIMES more at
random moments.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.packed import packed_base

from fisedit_compile.cache.read_base import open_base
from fisedit_compile.cache.remove_base import remove_base, remove_leftovers
from fisedit_compile.cache.write_base import write_base

#: What changes the file system, or has to be known to be on the disk.
CALLS = ("mkdir", "open", "write", "fsync", "utime", "rename", "unlink", "rmdir")


def die_at(count: int) -> None:
    """Let the process be killed at the ``count``-th of its calls; a write has written its half by then."""
    left = [count]

    def killing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in CALLS:
        setattr(os, name, killing(name, getattr(os, name)))


def killed(work: Callable[[], None], *, after: float | None = None) -> bool:
    """Whether a fork that runs ``work`` was killed, by itself or ``after`` some seconds."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def whole(folder: Path) -> bool:
    """Whether there is a base, which then has to be whole; False if there is none."""
    if not folder.exists():
        return False
    with open_base(folder) as opened:
        opened.verify()
    return True


def main() -> None:
    folder, times, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    chance = random.Random(seed)
    packed = packed_base(shards=1, kib=64)
    counts = {"killed": 0, "whole": 0, "none": 0, "leftovers": 0}

    def check(base: Path) -> None:
        counts["whole" if whole(base) else "none"] += 1
        counts["leftovers"] += len(remove_leftovers(folder))
        if whole(base):
            remove_base(base)
        assert not any(each.name.startswith(".") for each in folder.iterdir())

    def write(base: Path) -> None:
        write_base(packed, base)

    for change in (write, remove_base):
        for count in range(1000):
            base = folder / f"{change.__name__}-{count}"
            if change is remove_base:
                write(base)

            def work(base: Path = base, count: int = count, change: Callable[[Path], None] = change) -> None:
                die_at(count)
                change(base)

            died = killed(work)
            check(base)
            counts["killed"] += died
            if not died:
                break
    start = time.perf_counter()
    write(folder / "timed")
    seconds = time.perf_counter() - start
    remove_base(folder / "timed")
    for i in range(times):
        base = folder / f"random-{i}"
        counts["killed"] += killed(lambda base=base: write(base), after=chance.uniform(0, 1.5 * seconds))  # type: ignore[misc]
        check(base)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
