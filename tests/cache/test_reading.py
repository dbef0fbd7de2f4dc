"""Shards that are read in the background: what is in them, and what ends the reading."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.packed import packed_base

from fisedit_compile import BaseMemoryError, DamagedBaseError, SavedBaseError
from fisedit_compile.cache import file_checksum, landing, memory, shard_file
from fisedit_compile.cache.checked_file import CheckedFile
from fisedit_compile.cache.landing import Landing
from fisedit_compile.cache.packed_base import PackedBase, place
from fisedit_compile.cache.read_base import open_base
from fisedit_compile.cache.reading import Reading, Shard
from fisedit_compile.cache.remove_base import why_kept
from fisedit_compile.cache.shard_file import parts_of
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.cache.write_base import write_base

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NBYTES = 1000


def values() -> dict[str, torch.Tensor]:
    """A tensor of every kind that a shard takes."""
    noise = torch.randn(3, 5, 4)
    kinds = [torch.bool, torch.uint8, torch.int64, torch.uint16, torch.float8_e4m3fn, torch.bfloat16, torch.complex64]
    found = {str(kind): noise.to(kind) for kind in kinds}
    return {
        **found,
        "number": torch.tensor(1.5),
        "nothing": torch.empty(0, 7),
        "channels last": torch.randn(1, 4, 3, 2).to(memory_format=torch.channels_last),
        "with gaps": torch.randn(8, 8)[::2, 1::2],
        "large": torch.randint(0, 255, (5 * 2**20 + 1,), dtype=torch.uint8),
    }


def test_tensors_of_a_shard_are_what_was_written(tmp_path: Path) -> None:
    packed, kept = PackedBase(), values()
    references = {name: packed.keep_in("call-0000.safetensors")(tensor, name) for name, tensor in kept.items()}
    write_base(packed, tmp_path / "base")
    with open_base(tmp_path / "base") as opened:
        read = Landing(opened, CPU).read("call-0000.safetensors", lambda name: None if name == "number" else CPU)
        assert opened.shard_nbytes("call-0000.safetensors") == sum(each.nbytes for each in kept.values())
    assert set(read) == set(kept) - {"number"}
    for name, tensor in read.items():
        assert tensor.data_ptr() % 64 == 0, name  # as torch's own memory, on which the last bits of products depend
        got = place(tensor, references[name], CPU)
        assert (got.dtype, got.shape) == (kept[name].dtype, kept[name].shape)
        assert torch.equal(got.view(-1).float() if got.dtype is torch.float8_e4m3fn else got,
                           kept[name].view(-1).float() if got.dtype is torch.float8_e4m3fn else kept[name])  # fmt: skip
        if name != "with gaps":
            assert got.stride() == kept[name].stride(), name


def part(shape: Any = (2,), offsets: Any = (0, 8), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"a": part(offsets=[4, 12])},
        {"a": part(), "b": part(offsets=[4, 12])},
        {"a": part(), "b": part(offsets=[9, 17])},
        {"a": part(offsets=[0, 9])},
        {"a": part(shape=[-2])},
        {"a": part(shape=[True, 2])},
        {"a": part(shape=["2"])},
        {"a": part(shape=[2.0])},
        {"a": part(shape=[2**60])},
        {"a": part(dtype="F4")},
        {"a": part(offsets=["0", "8"])},
        {"a": part(offsets=8)},
        {"a": 1},
        {"a": {}},
        [1],
        "words",
        {},
    ],
)
def test_headers_that_do_not_describe_the_file(header: Any) -> None:
    with pytest.raises(ValueError, match="no safetensors"):
        parts_of(json.dumps(header).encode(), 8)


def test_a_header_that_is_no_json() -> None:
    for header in (b"\x80", b"[" * 100_000, b"{"):
        with pytest.raises(ValueError, match="no safetensors"):
            parts_of(header, 8)


class Gates:
    """Shards that are read when their gates are opened, in a folder that is closed when ``closed`` is set."""

    def __init__(self, count: int) -> None:
        self.gates = [threading.Event() for _ in range(count)]
        self.begun = [threading.Event() for _ in range(count)]
        self.closed = threading.Event()
        self.errors: dict[int, BaseException] = {}
        self.calls = [Recorded(None, (), {}) for _ in range(count)]  # type: ignore[arg-type]
        folder = ExitStack()
        folder.callback(self.closed.set)
        self.reading: Reading | None = Reading(
            "base", [Shard(self._read_of(i), NBYTES, CPU) for i in range(count)], folder
        )

    def _read_of(self, index: int) -> Callable[[Callable[[], None]], Recorded]:
        def read(go_on: Callable[[], None]) -> Recorded:
            self.begun[index].set()
            while not self.gates[index].wait(0.005):
                go_on()
            go_on()
            if index in self.errors:
                raise self.errors[index]
            return self.calls[index]

        return read


class TestReading:
    def test_each_shard_is_waited_for_alone_and_in_order(self) -> None:
        made = Gates(3)
        assert made.reading is not None
        assert made.begun[0].wait(5)
        assert not made.begun[1].is_set()
        made.gates[0].set()
        assert made.reading.get(0) is made.calls[0]
        assert (made.reading.is_in(0), made.reading.is_in(1)) == (True, False)
        assert not made.closed.is_set()
        late: list[Recorded] = []
        thread = threading.Thread(target=lambda: late.append(made.reading.get(2)))  # type: ignore[union-attr]
        thread.start()
        made.gates[2].set()
        time.sleep(0.02)
        assert not late
        made.gates[1].set()
        thread.join(5)
        assert late == [made.calls[2]]
        assert made.closed.is_set()  # before anybody has the last one
        made.reading.wait()

    def test_nothing_to_read(self) -> None:
        made = Gates(0)
        assert made.closed.is_set()
        made.reading.wait()  # type: ignore[union-attr]

    def test_one_that_fails_ends_the_others_and_frees_them(self) -> None:
        made = Gates(3)
        assert made.reading is not None
        made.errors[1] = DamagedBaseError("call 1 is damaged")
        made.gates[0].set()
        made.reading.get(0)
        made.gates[1].set()
        raised = []
        for index in (2, 1, 0):
            with pytest.raises(DamagedBaseError, match="call 1 is damaged") as info:
                made.reading.get(index)
            raised.append(info.value)
            assert made.closed.is_set()  # who meets the error may remove the folder
        with pytest.raises(DamagedBaseError, match="call 1 is damaged"):
            made.reading.wait()
        assert len(set(map(id, raised))) == 3  # errors hold the frames of who met them
        assert not made.begun[2].is_set()
        assert not made.reading.is_in(0)

    def test_one_that_fails_just_behind_another_that_is_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = Gates(2)
        assert made.reading is not None
        made.errors[1] = DamagedBaseError("call 1 is damaged")
        work = made.reading._work
        real = work._wait

        def slow(enough: Callable[[], bool]) -> None:
            made.gates[0].set()
            real(enough)
            made.gates[1].set()
            while work.read:
                time.sleep(0.001)

        monkeypatch.setattr(work, "_wait", slow)
        with pytest.raises(DamagedBaseError, match="call 1 is damaged"):
            made.reading.get(0)

    def test_nobody_wants_it_any_more(self) -> None:
        made = Gates(3)
        assert made.begun[0].wait(5)
        made.reading = None
        assert made.closed.wait(5)

    @pytest.mark.parametrize("end", ["read", "failed", "let go of"])
    def test_its_memory_counts_as_taken_until_it_is(self, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "_available", lambda: 10 * NBYTES)
        monkeypatch.setattr(memory, "_left_to_container", lambda: 2**60)
        made = Gates(2)
        assert memory.free_bytes(CPU) == 8 * NBYTES
        assert memory.free_bytes(torch.device("meta")) == 10 * NBYTES
        if end == "failed":
            made.errors[0] = BaseMemoryError("no room")
        if end == "let go of":
            made.reading = None
        for gate in made.gates:
            gate.set()
        assert made.closed.wait(5)
        assert memory.free_bytes(CPU) == 10 * NBYTES

    def test_what_ought_not_to_happen_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        made = Gates(1)
        made.errors[0] = ZeroDivisionError("a fault")
        made.gates[0].set()
        with pytest.raises(ZeroDivisionError, match="a fault"):
            made.reading.wait()  # type: ignore[union-attr]
        assert "in read" in caplog.text

    def test_a_process_that_is_forked_meanwhile(self) -> None:
        """It has none of the threads: it may not wait for them."""
        made = Gates(2)
        assert made.reading is not None
        made.gates[0].set()
        made.reading.get(0)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                made.reading.get(0)
                made.reading.get(1)
            except SavedBaseError as error:
                status = 0 if "forked: call base.wait() before" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        made.gates[1].set()
        made.reading.wait()
        child = os.fork()
        if child == 0:
            try:
                made.reading.wait()
                assert made.reading.get(1) is made.calls[1]
            except BaseException:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

    @pytest.mark.parametrize("how", ["ends", "is interrupted", "is killed"])
    def test_the_interpreter_exits(self, tmp_path: Path, how: str) -> None:
        """The reading would take an hour; its folder is let go of at once."""
        write_base(packed_base(), tmp_path / "base")
        script = f"""
import signal, sys, time
from contextlib import ExitStack
from pathlib import Path
import torch
from fisedit_compile.cache.read_base import open_base
from fisedit_compile.cache.reading import Reading, Shard

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it

def read(go_on):
    for _ in range(360_000):
        time.sleep(0.01)
        go_on()

stack = ExitStack()
stack.enter_context(open_base(Path({str(tmp_path / "base")!r})))
reading = Reading("base", [Shard(read, 1, torch.device("cpu"))] * 20, stack)
print("begun", flush=True)
if {how!r} != "ends":
    reading.wait()
"""
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
            if how != "ends":
                assert "is in use" in why_kept(tmp_path / "base")
                child.send_signal(signal.SIGINT if how == "is interrupted" else signal.SIGKILL)
            try:
                _, errors = child.communicate(timeout=120)
            finally:
                child.kill()
        assert (child.returncode == 0) == (how == "ends"), errors
        assert "fisedit" not in errors.replace(str(ROOT), "") or how != "ends"
        assert why_kept(tmp_path / "base") == ""


def test_a_shard_is_not_read_to_its_end_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_checksum, "RANGE", 2**18)
    write_base(packed_base(kib=9 * 1024, shards=1), tmp_path / "base")
    asked, read = [], []
    fill = CheckedFile.fill

    def go_on() -> None:
        asked.append(1)
        if len(asked) >= 2:
            raise InterruptedError

    def counted(file: CheckedFile, start: int, memories: Any) -> None:
        read.append(sum(map(len, memories)))
        fill(file, start, memories)

    monkeypatch.setattr(CheckedFile, "fill", counted)
    with open_base(tmp_path / "base") as opened, pytest.raises(InterruptedError):
        Landing(opened, CPU).read("call-0000.safetensors", lambda _: CPU, go_on)
    large = [each for each in read if each > 2**16]  # others are the manifest's and the shard's header
    assert len(large) == 1
    assert large[0] <= 2**18


def test_the_file_system_may_give_less_than_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_checksum, "RANGE", 2**14)
    packed = packed_base(kib=64, shards=1)
    write_base(packed, tmp_path / "base")
    real = os.preadv

    def few(descriptor: int, memories: Any, start: int) -> int:
        """700 bytes of the first piece; or what is left of it, and the next one."""
        return real(descriptor, [memories[0][:700], *(memories[1:2] if len(memories[0]) <= 700 else [])], start)

    monkeypatch.setattr(os, "preadv", few)
    with open_base(tmp_path / "base") as opened:
        read = Landing(opened, CPU).read("call-0000.safetensors", lambda _: CPU)
    assert read.keys() == packed.shards["call-0000.safetensors"].keys()
    for name, tensor in packed.shards["call-0000.safetensors"].items():
        assert torch.equal(read[name], tensor), name


def test_a_shard_is_what_the_library_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of tensors that share memory, are conjugated, empty or single numbers."""
    monkeypatch.setattr(shard_file, "PIECE", 100)
    wide = torch.randn(4, 6)
    tensors = {
        "numbers": torch.arange(7, dtype=torch.uint8),
        "a row": wide[1],
        "a column": wide[:, 1],
        "all": wide,
        "turned": wide.t(),
        "half": wide.half(),
        "one": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.empty(3, 0, dtype=torch.int64),
        "flags": wide > 0,
        "complex": torch.complex(wide, wide).conj(),
    }
    file = tmp_path / "shard.safetensors"
    file.write_bytes(b"".join(bytes(chunk) for chunk in shard_file.shard_chunks(tensors)))
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype is tensor.dtype
        assert torch.equal(read[name], tensor.resolve_conj()), name
    assert (int.from_bytes(file.read_bytes()[:8], "little") + 8) % shard_file.ALIGNMENT == 0


def test_tensors_of_any_size_lie_as_kernels_need_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some are no multiple of what tensors are aligned to, some larger than a piece, some empty."""
    monkeypatch.setattr(landing, "PIECE", 4096)
    dtypes, sizes = (torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn), (0, 1, 5, 16, 257, 5000)
    tensors = {f"{dtype} {size}": torch.randn(size).to(dtype) for dtype in dtypes for size in sizes}
    write_base(PackedBase({}, {}, {"call-0000.safetensors": dict(tensors)}), tmp_path / "base")
    with open_base(tmp_path / "base") as opened:
        read = Landing(opened, CPU).read(
            "call-0000.safetensors", lambda name: CPU if name != "torch.uint8 16" else None
        )
    assert read.keys() == tensors.keys() - {"torch.uint8 16"}
    for name, tensor in read.items():
        assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8)), name
        assert tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("error", [RuntimeError("can't allocate"), MemoryError(), torch.OutOfMemoryError("full")])
def test_no_memory_for_a_shard(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(packed_base(), tmp_path / "base")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise error

    with open_base(tmp_path / "base") as opened:
        landing = Landing(opened, CPU)
        monkeypatch.setattr(torch, "empty", full)
        with pytest.raises(BaseMemoryError, match=r"base does not fit .* \(call-0001\.safetensors: "):
            landing.read("call-0001.safetensors", lambda _: CPU)
        monkeypatch.undo()
        assert landing.read("call-0001.safetensors", lambda _: CPU)


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path) -> None:
    write_base(packed_base(kib=9 * 1024, shards=1), tmp_path / "base")
    path = tmp_path / "base" / "call-0000.safetensors"
    with (
        open_base(tmp_path / "base") as opened,
        pytest.raises(DamagedBaseError, match=r"call-0000\.safetensors was cut short while it was read"),
    ):
        Landing(opened, CPU).read("call-0000.safetensors", lambda _: CPU, lambda: os.truncate(path, 5000))
    gc.collect()
