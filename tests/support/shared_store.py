"""Several processes that put, read, evict and remove bases in one store at once; some are killed meanwhile.

``python shared_store.py FOLDER PROCESSES ROUNDS SEED`` prints what they did, as JSON, and fails where one of them met a
base that is not whole, or a store over its budget.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.packed import packed_base

from fisedit_compile.cache.landing import Landing
from fisedit_compile.cache.packed_base import PackedBase
from fisedit_compile.cache.read_base import open_base
from fisedit_compile.cache.store import BaseStore
from fisedit_compile.errors import BaseFormatError, BaseInUseError

KIB = 64
CPU = torch.device("cpu")


class Small:
    """A base whose tensors are known from its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def pack(self) -> PackedBase:
        return packed_base(self.number, shards=2, kib=KIB)


def size() -> int:
    return Small(0).pack().nbytes


def work(folder: Path, rounds: int, seed: int) -> None:
    """Some random operations; any error but those that sharing brings about ends the process with a status."""
    chance, store = random.Random(seed), BaseStore(folder, 4 * size())
    for i in range(rounds):
        names = [base.name for base in store.bases()]
        operation = chance.choice(("put", "get", "get", "evict", "remove"))
        try:
            if operation == "put":
                store.put(Small(seed * 1000 + i), f"base-{seed * 1000 + i}")
            elif operation == "evict":
                store.evict(chance.randrange(1, 5) * size())
            elif names and operation == "remove":
                store.remove(chance.choice(names))
            elif names:
                with store.get(chance.choice(names)) as base, open_base(base) as opened:
                    time.sleep(chance.uniform(0, 0.005))
                    assert (base / "manifest.json").exists(), "a base in use was removed"
                    read = Landing(opened, CPU).read("call-0001.safetensors", lambda _: CPU)["noise"]
                    want = Small(int(base.name.partition("-")[2])).pack().shards["call-0001.safetensors"]["noise"]
                    assert torch.equal(read, want), "another base's tensors"
                    opened.verify()
        except BaseInUseError:
            assert operation != "get"
        except BaseFormatError:  # gone between the look and the operation
            assert operation in ("get", "remove")
        taken = sum(base.bytes for base in store.bases())
        assert taken <= store.max_bytes, f"{taken} bytes in a store of {store.max_bytes}"


def main() -> None:
    folder, processes, rounds, seed = Path(sys.argv[1]), *map(int, sys.argv[2:])
    torch.set_num_threads(1)
    children: dict[int, bool] = {}
    for i in range(processes):
        child = os.fork()
        if child == 0:
            work(folder, rounds, seed + i)
            os._exit(0)
        children[child] = False
    for child in list(children)[::2]:
        time.sleep(0.1)
        os.kill(child, signal.SIGKILL)
        children[child] = True
    for child, was_killed in children.items():
        _, status = os.waitpid(child, 0)
        assert was_killed or status == 0, f"a process ended with status {status}"
    store = BaseStore(folder, 4 * size())
    store.evict()
    bases: list[Any] = store.bases()
    for base in bases:
        assert not base.problem
        with store.get(base.name) as path, open_base(path) as opened:
            opened.verify()
    assert {each.name for each in folder.iterdir()} == {".lock", *(base.name for base in bases)}
    print(json.dumps({"bases": len(bases), "killed": sum(children.values())}))


if __name__ == "__main__":
    main()
