"""A service in processes of its own, some of which are killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil


class ServiceProcesses:
    """A service that runs.

    Attributes:
        url: where it answers.
        process: the one that was started; its children draw.
        killed: replicas that were killed.
    """

    def __init__(self, url: str, process: subprocess.Popen[str]) -> None:
        self.url, self.killed, self.process = url, 0, process

    def replicas(self) -> list[psutil.Process]:
        """The processes that draw."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ray::ServeReplica" in " ".join(child.cmdline())]

    def kill_one(self, chance: random.Random) -> None:
        """Kill a replica, as a fault would."""
        if replicas := self.replicas():
            chance.choice(replicas).send_signal(signal.SIGKILL)
            self.killed += 1


@contextmanager
def running_service(options: Sequence[str]) -> Iterator[ServiceProcesses]:
    """Within the context ``fisedit-compile serve`` runs with these options, on a free port of this machine.

    Raises:
        RuntimeError: it could not be started; with all that it said.
    """
    command = [sys.executable, "-m", "fisedit_compile", "serve", "--port", "0", "--no-page", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("ready: "):
                break
        else:
            raise RuntimeError("".join(said))
        threading.Thread(target=said.extend, args=(process.stdout,), daemon=True).start()  # or it waits for a reader
        yield ServiceProcesses(line.removeprefix("ready: ").strip(), process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
