"""The graph can be looked at before and after each pass: from a program, and through the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.hand_built import CONFIG, HandBuilt
from torch.fx import GraphModule

from fisedit_compile.passes.graph_dump import VARIABLE, dump_graphs
from fisedit_compile.passes.manager import SPARSE_PASSES, run_passes

pytestmark = pytest.mark.usefixtures("one_thread")


def small() -> GraphModule:
    build = HandBuilt()
    return build.output(build.conv(build.latents(), path="conv_in"))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.txt"))


def test_the_passes_that_are_named_and_no_others(tmp_path: Path) -> None:
    with dump_graphs("sparsify_conv", "hoist_invariants", folder=tmp_path):
        run_passes(small(), CONFIG)
    run_passes(small(), CONFIG)  # the context is left
    assert files(tmp_path) == [
        f"graph_0/{name}.{moment}.txt"
        for name in ("04_sparsify_conv", "14_hoist_invariants")
        for moment in ("after", "before")
    ]
    before, after = (
        (tmp_path / "graph_0" / f"04_sparsify_conv.{moment}.txt").read_text() for moment in ("before", "after")
    )
    assert "fisedit.conv2d_rows" not in before
    (line,) = [line for line in after.splitlines() if "target=torch.ops.fisedit.conv2d_rows" in line]
    assert line.endswith("# float64[60, 4], conv_in, row_layout bchw at 6x5")
    assert "stage constant" in (tmp_path / "graph_0" / "14_hoist_invariants.after.txt").read_text()


def test_every_graph_has_a_folder_of_its_own(tmp_path: Path) -> None:
    with dump_graphs("all", folder=tmp_path / "new"):
        for _ in range(2):
            run_passes(small(), CONFIG)
    assert len(files(tmp_path / "new")) == 2 * 2 * len(SPARSE_PASSES)
    assert {path.split("/")[0] for path in files(tmp_path / "new")} == {"graph_0", "graph_1"}


def test_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, " fuse_norms, select_region")
    run_passes(small(), CONFIG)
    names = {path.split("/")[-1].split(".")[0] for path in files(tmp_path)}
    assert names == {"02_select_region", "12_fuse_norms"}
    assert files(tmp_path)[0].startswith("fisedit_dump/graph_0/")


def test_a_name_that_no_pass_has_is_refused_before_anything_runs(tmp_path: Path) -> None:
    graph_module = small()
    text = str(graph_module.graph)
    with (
        dump_graphs("fuse_norm", folder=tmp_path),
        pytest.raises(
            ValueError, match=r"no pass to dump is called fuse_norm; give some of annotate_layout, select_reg"
        ),
    ):
        run_passes(graph_module, CONFIG)
    assert (str(graph_module.graph), files(tmp_path)) == (text, [])
