"""What is free, and the refusal of what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fisedit_compile.cache.memory as memory
from fisedit_compile.cache.memory import free_bytes, require_room
from fisedit_compile.errors import BaseMemoryError, FiseditError

CPU = torch.device("cpu")
GIB = 2**30


def write_container(folder: Path, names: tuple[str, str, str], limit: str, taken: int, files: int) -> None:
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{taken}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {files}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for what a kernel says of a machine with 8 GiB available, without a container."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 * 2**20} kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINERS", [(tmp_path, *each[1:]) for each in memory._CONTAINERS])
    return tmp_path


def test_what_the_kernel_calls_available_is_free(machine: Path) -> None:
    assert free_bytes(CPU) == 8 * GIB


@pytest.mark.parametrize("version", [0, 1])
def test_the_limit_of_a_container_counts_where_it_is_lower(machine: Path, version: int) -> None:
    names = memory._CONTAINERS[version][1:]
    write_container(machine, names, "max" if version == 0 else str(2**63 - 4096), 10 * GIB, 0)
    assert free_bytes(CPU) == 8 * GIB
    write_container(machine, names, str(4 * GIB), 3 * GIB, GIB)  # a third of what is taken are files that make room
    assert free_bytes(CPU) == 2 * GIB


def test_this_machine_says_what_is_free() -> None:
    assert 2**20 < free_bytes(CPU) < 2**60


def test_what_does_not_fit_is_refused_with_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * GIB)
    require_room(3 * GIB, CPU, "A base", ["fewer steps"])
    with pytest.raises(
        BaseMemoryError, match=r"A base would take 4\.5 GiB of cpu, where 3\.0 GiB are free\. .*steps; x"
    ):
        require_room(9 * GIB // 2, CPU, "A base", ["fewer steps", "x"])
    assert issubclass(BaseMemoryError, FiseditError)
    assert issubclass(BaseMemoryError, MemoryError)


@pytest.mark.gpu
def test_what_the_allocator_holds_unused_is_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    del block  # back to torch's allocator, not to the driver
    found = torch.cuda.mem_get_info(device)  # other programs may take memory while the test runs
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: found)
    before = free_bytes(device)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert free_bytes(device) <= before - 2**28
    del block
    assert free_bytes(device) >= before
