"""Whether there is room for what a base will keep, asked before its first step, or before its shards are read."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import torch

from fisedit_compile.errors import BaseMemoryError

_GIB = 2**30

#: Where the kernel says how much memory programs can still get.
_MEMINFO = Path("/proc/meminfo")

#: Where it says what a container may take (cgroups of version 2 and 1): the limit, what is taken, and how much of that
#: is files that would make room.
_CONTAINERS = [
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
]

#: Bytes on each device that bases will take whose shards are being read.
_promised: Counter[torch.device] = Counter()
_promising = threading.Lock()


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on ``device``, in bytes.

    On a GPU what the driver has and what torch's allocator holds unused; on the CPU what the kernel calls available, or
    what the container may still take, if that is less. What was promised is taken.
    """
    if device.type == "cuda":
        left, _ = torch.cuda.mem_get_info(device)
        left += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        left = min(_available(), _left_to_container())
    return left - _promised[device]


def promise(nbytes: int, device: torch.device) -> None:
    """Count memory as taken that will be, until it is; a negative number takes that back."""
    with _promising:
        _promised[device] += nbytes


def require_room(needed: int, device: torch.device, what: str, options: list[str]) -> None:
    """Hold what is needed to what is free.

    Args:
        needed: bytes.
        device: where they are needed.
        what: what needs them, as the message begins.
        options: what a user can do to need less, for the message.

    Raises:
        BaseMemoryError: less is free.
    """
    free = free_bytes(device)
    if needed > free:
        raise BaseMemoryError(
            f"{what} would take {needed / _GIB:.1f} GiB of {device}, where {free / _GIB:.1f} GiB are free. "
            f"To need less: {'; '.join(options)}"
        )


def _available() -> int:
    lines = (line.split() for line in _MEMINFO.read_text().splitlines())
    return next(int(kilobytes) * 1024 for name, kilobytes, *_ in lines if name == "MemAvailable:")


def _left_to_container() -> int:
    """What the limit of the process's container leaves; without a limit, more than any machine has."""
    for folder, limit, taken, files in _CONTAINERS:
        if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
            lines = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
            reclaimable = next(int(count) for name, count in lines if name == files)
            return int(most) - int((folder / taken).read_text()) + reclaimable
    return 2**63
