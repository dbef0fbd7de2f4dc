"""How Table A1 measures a method, and what it keeps of runs that are cut off or extend another."""

from __future__ import annotations

import argparse
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # as Python does for a script that lies there

import table_a1  # noqa: E402
from baselines.calls import CallKey, CallLog  # noqa: E402
from baselines.fisedit import FISEdit  # noqa: E402
from baselines.measure import FAILED, OK, OUT_OF_MEMORY, Row, measure  # noqa: E402
from baselines.method import CallCount, Method  # noqa: E402
from baselines.text import markdown  # noqa: E402
from baselines.text_to_image import CompiledTextToImage  # noqa: E402

from fisedit_compile import SparsityConfig  # noqa: E402
from fisedit_compile.bench.masks import MaskSet  # noqa: E402
from fisedit_compile.masks.sample_masks import square_mask  # noqa: E402

SMALL = ["--arch", "tiny", "--size", "128"]


def small_kit() -> Any:
    return table_a1.Kit("tiny", 128, torch.device("cpu"), torch.float32)


class Stub(Method):
    """A method of one call, whose phases are noted and can fail."""

    title, source = "stub", "nobody"
    error: tuple[type[Exception], str] | None = None

    def __init__(self, kit: Any) -> None:
        super().__init__(kit)
        self.phases: list[str] = kit.shared.setdefault("phases", [])
        self.phases.append("built")
        kit.shared["method"] = weakref.ref(self)
        self.itself = self  # only the garbage collector frees it, as it is with pipelines
        self._unet = torch.nn.Conv2d(4, 4, 1)
        self._unet.forward = lambda sample, t, text: (sample * kit.shared.get("scale", 1),)

    @property
    def unet(self) -> torch.nn.Module:
        return self._unet

    def prepare(self, steps: int) -> None:
        self.phases.append("prepared")

    @torch.no_grad()
    def make(self) -> None:
        self.phases.append(f"ran {self.steps}")
        if self.error:
            raise self.error[0](self.error[1])
        self._unet(torch.ones(2, 4, 8, 8), 0, torch.ones(2, 77, 8))

    def close(self) -> None:
        self.phases.append("closed")

    def count(self, steps: int) -> list[CallCount]:
        return [CallCount("batch 2", 1, 8)]


def measure_stub(kit: Any, **shared: Any) -> Row:
    kit.shared.update(shared)
    counting_kit: Any = SimpleNamespace(shared={})
    return measure("stub", Stub, kit, counting_kit, 50, lambda text: None)


class TestMeasure:
    def test_on_cuda_memory_and_time_are_of_a_second_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        kit = SimpleNamespace(device=torch.device("cuda"), shared={})
        phases: list[str] = kit.shared.setdefault("phases", [])
        memory = {"memory_allocated": 2**31, "max_memory_allocated": 2**32}
        for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", *memory):
            monkeypatch.setattr(
                torch.cuda, name, lambda *args, name=name: (phases.append(name), memory.get(name))[1], raising=True
            )
        row = measure_stub(kit)
        assert (row.status, row.held_gib, row.peak_gib) == (OK, 2, 4)
        assert phases == [
            *("built", "prepared", "ran 4", "synchronize", "reset_peak_memory_stats", "memory_allocated"),
            *("ran 50", "synchronize", "max_memory_allocated", "closed", "empty_cache"),
        ]

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (None, OK),
            ((torch.OutOfMemoryError, "Tried to allocate 3 GiB"), OUT_OF_MEMORY),
            ((RuntimeError, "CUDA error: out of memory"), OUT_OF_MEMORY),
            ((RuntimeError, "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), OUT_OF_MEMORY),
            ((RuntimeError, "boom"), f"{FAILED}: RuntimeError: boom"),
        ],
    )
    def test_nothing_of_a_method_is_left(
        self, error: tuple[type[Exception], str] | None, status: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Stub, "error", error)
        kit = small_kit()
        row = measure_stub(kit)
        assert row.status == status
        assert (f"| {status} |" in markdown([row], {"arch": "tiny", "size": 128, "steps": 5})) == (status != OK)
        assert kit.shared["method"]() is None
        assert kit.shared["phases"][-1] == "closed"

    def test_numbers_that_ran_over_are_told(self) -> None:
        row = measure_stub(small_kit(), scale=float("nan"))
        assert row.finite is False
        conditions = {"arch": "tiny", "size": 128, "steps": 5}
        assert "(not finite) |" in markdown([row], conditions)
        assert "not finite" not in markdown([measure_stub(small_kit())], conditions)

    def test_a_run_of_other_calls_than_were_counted_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Stub, "count", lambda self, steps: [CallCount("batch 2", 2, 8)])
        assert measure_stub(small_kit()).status.startswith(f"{FAILED}: AssertionError")

    def test_what_lies_between_pictures_is_no_call_time(self) -> None:
        log = CallLog(torch.nn.Identity(), lambda index: "")
        log.keys = [CallKey((2, 4, 8, 8), (2, 77, 8), grad=False, kind="")] * 4
        log._starts, log._ends = [0.0, 2.0, 100.0, 101.0], [1.0, 3.0, 101.0, 105.0]
        assert log.seconds(images=2) == 3 + 5
        assert log.seconds() == 105
        with pytest.raises(ValueError, match="4 calls"):
            log.seconds(images=3)

    def test_compiling_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        phases: list[str] = []

        def compile(unet: torch.nn.Module, *, mode: str) -> torch.nn.Module:
            assert mode == "default"  # on a CPU, where there are no CUDA graphs
            unet.register_forward_pre_hook(lambda *_: phases.append("call"))
            return unet

        monkeypatch.setattr(torch, "compile", compile)
        monkeypatch.setattr(torch.compiler, "reset", lambda: phases.append("forgotten"))
        monkeypatch.setattr(
            CallLog, "__enter__", lambda self, old=CallLog.__enter__: (phases.append("log"), old(self))[1]
        )
        kit, counting = small_kit(), table_a1.Kit("tiny", 128, torch.device("cpu"), torch.float32, counting=True)
        assert measure("compiled", CompiledTextToImage, kit, counting, 3, lambda text: None).status == OK
        counted, compiled, timed = ["log"], 2 * ["call"], ["log", *3 * ["call"]]
        assert phases == [*counted, *compiled, *timed, "forgotten"]

    @pytest.mark.parametrize(("compiled", "device", "edits"), [(False, "cpu", 1), (True, "cpu", 3), (False, "cuda", 3)])
    def test_fisedit_is_warm(self, compiled: bool, device: str, edits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        # Once for each mask where its number of pixels may need graphs of its own.
        masks = MaskSet(0.1, [square_mask(share, (16, 16)) for share in (0.1, 0.2, 0.3)], "some.npz")
        edited: list[Any] = []
        editor = SimpleNamespace(edit=lambda base, prompt, mask: edited.append(mask))
        kit: Any = SimpleNamespace(device=torch.device(device))
        method = FISEdit(kit, masks, SparsityConfig(compile=compiled))
        monkeypatch.setattr(method, "_base_for", lambda steps: (editor, None))
        method.prepare(5)
        assert all(a is b for a, b in zip(edited, masks.masks[:edits], strict=True))


class TestResults:
    @pytest.fixture(scope="class")
    def finished(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        path = tmp_path_factory.mktemp("finished") / "table.json"
        assert self.run(path, "--methods", "sdtp") == 0
        return path.read_text()

    @staticmethod
    def run(path: Path, *given: str) -> int:
        return table_a1.main([*SMALL, "--device", "meta", "--steps", "2", "--json", str(path), *given])

    def test_a_run_cut_off_keeps_its_rows_and_a_later_one_extends_them(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def cut(self: Any) -> None:
            raise KeyboardInterrupt

        path, names = tmp_path / "table.json", ["sdtp", "sdip", "sdedit"]
        with monkeypatch.context() as patched:
            patched.setattr(table_a1.SDEdit, "make", cut)
            with pytest.raises(KeyboardInterrupt):
                self.run(path, "--methods", *names)
        assert [row["name"] for row in json.loads(path.read_text())["rows"]] == names[:2]
        progress = capsys.readouterr().err.splitlines()
        assert progress[-1].endswith("s] sdedit: counting")
        monkeypatch.setattr(table_a1.TextToImage, "title", "anew")
        assert self.run(path, "--methods", "sdedit", "sdtp") == 0
        result = json.loads(path.read_text())
        assert [row["name"] for row in result["rows"]] == names
        assert [row["title"] for row in result["rows"]][:2] == ["anew", "SDIP (inpainting)"]
        assert [command.rpartition("--methods ")[2] for command in result["commands"]] == [
            " ".join(names),
            "sdedit sdtp",
        ]
        assert capsys.readouterr().out.count("| SDIP (inpainting) |") == 2  # both tables have it

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("size", 64, "size 64, now 128"),
            ("device", "cuda", "device cuda, now meta"),
            ("versions", {"torch": "1.0"}, "torch 1.0, now"),
            ("rows", [{"name": "sdtp"}], "no table of this program"),
            ("commands", None, "no table of this program"),
        ],
    )
    def test_a_file_of_something_else_is_kept_and_told(
        self, key: str, value: Any, message: str, finished: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "table.json"
        path.write_text(before := json.dumps({**json.loads(finished), key: value}))
        assert self.run(path, "--methods", "sdtp") == 2
        assert message in capsys.readouterr().err
        assert path.read_text() == before

    def test_groups_are_their_methods(self) -> None:
        def names(*given: str) -> list[str]:
            args = argparse.Namespace(size=128, methods=list(given), masks=None)
            return list(table_a1.factories_of(args, SparsityConfig()))

        assert names("fisedit") == ["fisedit-5", "fisedit-15", "fisedit-30"]
        assert names("instead", "sdtp", "tome") == ["sdtp", "compiled", "deepcache", "tome"]
        assert names(*table_a1.GROUPS)[-3:] == names("fisedit")  # last: their base stays in memory
        assert {*names(*table_a1.GROUPS), "fisedit-real"} == {*table_a1.NAMES}
