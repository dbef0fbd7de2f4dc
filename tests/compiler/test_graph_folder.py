"""Exported graphs on the disk: another process reads them, and whatever is wrong with a file it is exported again."""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from support.changes import adapters
from support.unets import UNets
from torch.fx import Graph, GraphModule

from fisedit_compile import sparsify
from fisedit_compile.compiler import graph_folder
from fisedit_compile.compiler import lower as lowering
from fisedit_compile.compiler.graph_text import GraphTextError, as_text, of_text
from fisedit_compile.compiler.whole import lower_whole
from fisedit_compile.errors import CaptureError
from fisedit_compile.ir.call import Signature
from fisedit_compile.sparse_unet import SparseUNet

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = {"dense_below": 4, "dense_above": 1.0}
SIZE = (16, 16)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where graphs are kept in a test."""
    monkeypatch.setenv("FISEDIT_COMPILE_CACHE", str(tmp_path / "graphs"))
    return tmp_path / "graphs"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each export; what this process has lowered before is not there."""
    made: list[str] = []
    export = lowering.export
    monkeypatch.setattr(lowering, "export", lambda *args: made.append("export") or export(*args))
    monkeypatch.setattr(lowering, "_kept", type(lowering._kept)())
    return made


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch, exports: list[str]) -> Callable[[], None]:
    """What this process has lowered is forgotten, as if it were another one."""
    return lambda: monkeypatch.setattr(lowering, "_kept", type(lowering._kept)())


def captured(unets: UNets, prepare: Callable[[Any], object] = lambda unet: None) -> SparseUNet:
    unet = unets.fresh("micro")
    prepare(unet)
    sparse = sparsify(unet, CONFIG)
    args, kwargs = unets.inputs("micro", 2, SIZE, unet.dtype)
    sparse.program(sparse.call(*args, **kwargs))
    return sparse


def stepped(unets: UNets, sparse: SparseUNet) -> torch.Tensor:
    _, cache = sparse.record(unets.call(sparse, "micro", 2, SIZE))
    call = unets.call(sparse, "micro", 2, SIZE, seed=1)
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[:, 3:9, 2:7] = True
    return sparse.step(call, cache, sparse.prepare(call, mask))


def test_another_process_exports_nothing_and_computes_the_same(
    unets: UNets, folder: Path, exports: list[str], forget: Callable[[], None]
) -> None:
    first = stepped(unets, captured(unets))
    assert len(list(folder.glob("*.json"))) == 1
    forget()
    second = stepped(unets, captured(unets))
    assert exports == ["export"]
    assert torch.equal(first, second)


def test_all_graphs_that_are_made_of_it_are_the_same(
    unets: UNets, folder: Path, exports: list[str], forget: Callable[[], None]
) -> None:
    def graphs() -> list[str]:
        sparse = captured(unets)
        program = sparse.program(unets.call(sparse, "micro", 2, SIZE))
        lowered = program.lowered
        assert lowered.following is not None
        entries = [*lowered.kept.cache_entries, *lowered.kept.attention_entries]
        stages = [*lowered.stages.values(), *lowered.following.stages.values(), lowered.controlled(-1)]
        stages += [lowered.recording(entries, 1, -1), *lower_whole(lowered).stages.values()]
        stages += lower_whole(lowered, entries).stages.values()
        return [f"{stage.graph_module.code} {stage.names} {stage.outputs}" for stage in stages]

    first = graphs()
    forget()
    assert graphs() == first
    assert exports == ["export"]


@pytest.mark.parametrize("name", ["plain", "FreeU", "LoRA", "tiny-sdxl"])
def test_what_is_read_is_what_was_exported(unets: UNets, name: str) -> None:
    unet = unets.fresh("tiny-sdxl" if name == "tiny-sdxl" else "micro")
    if name == "FreeU":  # whose writing operations became others
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    elif name == "LoRA":
        adapters(unet, "snow")
    args, kwargs = unets.inputs("tiny-sdxl" if name == "tiny-sdxl" else "micro", 2, SIZE)
    exported = lowering.export(unet, sparsify(unet, CONFIG).call(*args, **kwargs))
    text = json.dumps(as_text(exported))
    again = of_text(json.loads(text))
    again.graph.lint()
    assert json.dumps(as_text(again)) == text
    assert [*map(str, exported.graph.nodes)] == [*map(str, again.graph.nodes)]
    for ours, theirs in zip(again.graph.nodes, exported.graph.nodes, strict=True):
        assert (ours.op, ours.target) == (theirs.op, theirs.target)
        assert str(ours.args) == str(theirs.args)
        assert ours.kwargs == theirs.kwargs
        assert ours.meta.get("module_path") == theirs.meta.get("module_path")
        if "val" in theirs.meta:
            assert repr(_shapes(ours.meta["val"])) == repr(_shapes(theirs.meta["val"]))


def _shapes(val: Any) -> Any:
    if isinstance(val, torch.Tensor):
        return tuple(val.shape), val.stride(), val.dtype, val.device
    return [*map(_shapes, val)]


@pytest.mark.parametrize(
    "difference",
    [
        lambda unet: unet.float(),
        lambda unet: setattr(unet.down_blocks[0].resnets[0], "output_scale_factor", 1.5),
        lambda unet: adapters(unet, "snow"),
    ],
    ids=["dtype", "scale", "LoRA"],
)
def test_another_form_has_a_file_of_its_own(
    unets: UNets, folder: Path, exports: list[str], difference: Callable[[Any], object]
) -> None:
    captured(unets)
    captured(unets, difference)
    assert len(exports) == len(list(folder.glob("*.json"))) == 2


def test_what_an_export_changes_is_refused_each_time(unets: UNets, folder: Path, exports: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(CaptureError, match="changes what it holds"):
            captured(unets, lambda unet: unet.set_attn_processor(Counting()))
    assert exports == ["export"] * 2
    assert not folder.exists()


class Counting(AttnProcessor):
    """Counts its calls."""

    calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return super().__call__(*args, **kwargs)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _replaced(path: Path, text: str) -> None:
    path.write_text(hashlib.sha256(text.encode()).hexdigest() + "\n" + text)


def _other_things(path: Path) -> None:
    _replaced(path, '{"one": [2, 3]}')


def _other_weights(path: Path) -> None:
    nodes = json.loads(path.read_text().splitlines()[1])
    node = next(node for node in nodes if node["op"] == "get_attr")
    node["val"]["shape"][0] += 1
    _replaced(path, json.dumps(nodes))


def _folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [_cut, _flip, _empty, _other_things, _other_weights, _folder_in_its_place], ids=lambda each: each.__name__
)
def test_a_damaged_file_is_told_and_the_model_exported_again(
    unets: UNets,
    folder: Path,
    exports: list[str],
    forget: Callable[[], None],
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = stepped(unets, captured(unets))
    (path,) = folder.glob("*.json")
    damage(path)
    forget()
    with caplog.at_level(logging.WARNING, "fisedit_compile"):
        second = stepped(unets, captured(unets))
    assert "exported again" in caplog.text
    assert exports == ["export"] * 2
    assert torch.equal(first, second)
    if path.is_file():
        forget()
        captured(unets)
        assert exports == ["export"] * 2  # the file was mended


def test_a_folder_that_cannot_be_written_to(
    unets: UNets, tmp_path: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FISEDIT_COMPILE_CACHE", str(tmp_path / "file" / "graphs"))
    with caplog.at_level(logging.INFO, "fisedit_compile"):
        captured(unets)
    assert "the graph is not kept on the disk" in caplog.text


def test_an_empty_name_keeps_none(
    unets: UNets, tmp_path: Path, exports: list[str], forget: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISEDIT_COMPILE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    captured(unets)
    forget()
    captured(unets)
    assert exports == ["export"] * 2
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FISEDIT_COMPILE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert graph_folder._folder() == tmp_path / "fisedit_compile" / "graphs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert graph_folder._folder() == tmp_path / ".cache" / "fisedit_compile" / "graphs"
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("Could not determine home directory.")))
    assert graph_folder._folder() is None


def test_the_oldest_files_go(folder: Path) -> None:
    for number in range(graph_folder._KEPT + 3):
        graph_folder.write_graph(f"{number}.json", _small())
        os.utime(folder / f"{number}.json", (number, number))
    for name in ("killed.part", "written.part", "other"):
        (folder / name).touch()
    os.utime(folder / "killed.part", (1, 1))
    graph_folder.write_graph("last.json", _small())
    left = {path.name for path in folder.iterdir()}
    assert {"written.part", "other"} < left
    assert "killed.part" not in left
    assert len(left) == graph_folder._KEPT + 2
    assert {"0.json", "1.json", "2.json", "3.json"}.isdisjoint(left)
    assert "last.json" in left


def _small() -> GraphModule:
    graph = Graph()
    given = graph.placeholder("given")
    given.meta.update(val=torch.empty(2, device="meta"), module_path="")
    graph.output(given)
    return GraphModule({}, graph)


def test_a_name_says_all_or_there_is_none() -> None:
    def name(*leaves: Any) -> str | None:
        return graph_folder.name_of("a.UNet", "form", Signature("tree", leaves))

    tensor = ((2, 4), torch.float32, torch.device("cpu"))
    names = [name(tensor), name(tensor, 1), name(tensor, True), name(tensor, "1"), name(tensor, None)]
    assert len(set(names)) == len(names)
    assert None not in names
    assert name(tensor, object()) is None


class TestText:
    def test_other_operations_are_not_written(self) -> None:
        graph = Graph()
        given = graph.placeholder("given")
        graph.output(graph.call_function(torch.nn.functional.relu, (given,)))
        with pytest.raises(GraphTextError, match="no operation of ATen"):
            as_text(GraphModule({}, graph))

    @pytest.mark.parametrize("target", ["os.system", "relu.nothing", "__class__.default", "system.default"])
    def test_other_operations_are_not_read(self, target: str) -> None:
        nodes = as_text(_small())
        call = {"op": "call_function", "name": "bad", "target": target, "args": [{"node": "given"}], "kwargs": {}}
        nodes.insert(1, {**call, "val": None, "path": ""})
        with pytest.raises(GraphTextError, match="torch has no operation"):
            of_text(nodes)

    def test_other_kinds_of_nodes_are_not_read(self) -> None:
        nodes = as_text(_small())
        nodes.insert(1, {**nodes[0], "op": "call_method", "name": "bad"})
        with pytest.raises(GraphTextError, match="a node that is a call_method"):
            of_text(nodes)

    def test_arguments_of_all_kinds(self) -> None:
        graph = Graph()
        given = graph.placeholder("given")
        arguments = ([1, 2.5, None, True, "text"], (given, [given]), torch.device("cpu"), torch.float16, torch.strided)
        node = graph.call_function(operator.getitem, arguments, {"format": torch.channels_last, "no": float("inf")})
        graph.output((node,))
        again = of_text(json.loads(json.dumps(as_text(GraphModule({}, graph)))))
        for ours, theirs in zip(again.graph.nodes, graph.nodes, strict=True):
            assert str(ours.args) == str(theirs.args)
            assert str(ours.kwargs) == str(theirs.kwargs)


SCRIPT = """
import torch
from fisedit_compile import sparsify
from fisedit_compile.architectures import build_unet, unet_inputs
from fisedit_compile.compiler import lower as lowering
export, exported = lowering.export, []
lowering.export = lambda *args: exported.append(1) or export(*args)
unet = build_unet("tiny", dtype=torch.float32)
args, kwargs = unet_inputs(unet, batch=2, height=128, width=128)
sparse = sparsify(unet, {"dense_below": 4})
sparse.program(sparse.call(*args, **kwargs))
print(len(exported))
"""


def test_processes_share_the_folder(folder: Path, exports: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    exec(SCRIPT, {})
    assert capsys.readouterr().out == "1\n"
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "0\n"
