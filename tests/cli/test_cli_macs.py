"""``fisedit-compile macs``: its table and file against the counts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.unets import MICRO, UNets

from fisedit_compile.cli import main
from fisedit_compile.macs.counter import count_macs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline without weights: the smallest U-Net, latent pixels four image pixels wide."""
    folder = tmp_path_factory.mktemp("model")
    configs = {"unet": {"_class_name": "UNet2DConditionModel", **MICRO, "sample_size": 32}}
    configs["vae"] = {"block_out_channels": [8, 8, 8]}
    for name, config in configs.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[list[str]]:
    """The words of each line of the table and below it."""
    assert main(["macs", *map(str, arguments)]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def giga(*macs: float) -> list[str]:
    return [f"{each / 1e9:,.2f}" for each in macs]


def test_the_table_and_the_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = (
        torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.1, 0.0, 0.4])[:, None, None]
    )
    np.savez(tmp_path / "masks.npz", masks=masks.numpy())
    lines = output(
        capsys,
        "--model",
        model,
        "--edit-size",
        0.1,
        1,
        "--masks",
        tmp_path / "masks.npz",
        "--json",
        tmp_path / "out.json",
    )
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["command"].startswith(f"fisedit-compile macs --model {model} ")
    assert result["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    square, _, real = rows = result["rows"]
    assert {"edit_size", "macs_dense", "macs_sparse", "ratio", "by_op", "by_resolution"} <= set(square)
    assert [row["edit_size"] for row in rows] == pytest.approx([100 / 1024, 1, float(masks[[0, 2]].float().mean())])

    assert " ".join(lines[0]).endswith("image 128x128, batch 2, full attention")
    table = {" ".join(line[:-4]): line[-4:] for line in lines[3:] if len(line) >= 5}
    assert lines[2] == ["dense", "9.8%", "100.0%", "2", "masks"]
    assert table["total"] == giga(square["macs_dense"], *(row["macs_sparse"] for row in rows))
    assert lines[4] == [f"{row['ratio']:.2f}x" for row in rows]
    for kind, beside in square["by_op"].items():
        assert table[kind] == giga(beside["dense"], *(row["by_op"][kind]["sparse"] for row in rows))
    mean, spread = real["macs_sparse"], real["masks"]
    assert (spread["source"], spread["used"], spread["empty"]) == ("masks.npz", 2, 1)
    assert mean == pytest.approx(np.mean([each["macs_sparse"] for each in spread["each"]]), abs=2)
    text = " ".join(" ".join(line) for line in lines[-2:])
    assert "masks.npz: 2 masks" in text
    assert f"(with the 1 empty ones {giga(spread['mean_with_empty'])[0]})" in text


def test_breakdowns(model: Path, unets: UNets, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = SimpleNamespace(unet=unets.dense("micro"), vae_scale_factor=4)
    report = count_macs(pipeline, height=128, width=128, batch=1, edit_size=0.2, attention="masked")
    assert report.sparse is not None
    blocks = ["time_embedding", "conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    expected = {
        "op": {name: giga(macs, report.by_op[name]) for name, macs in report.dense.by_op.items()},
        "resolution": {
            name: giga(n, report.by_resolution.get(name, 0)) for name, n in report.dense.by_resolution.items()
        },
        "module": {
            name: giga(report.dense.of_module(name), report.sparse.of_module(name)) for name in [*blocks, "conv_out"]
        },
    }
    for by, lines in expected.items():
        options = ("--model", model, "--batch", 1, "--edit-size", 0.2, "--attention", "masked", "--by", by)
        table = {line[0]: line[1:] for line in output(capsys, *options)[3:] if len(line) == 3}
        assert table.pop("total") == giga(report.dense.total, report.total)
        assert table == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arch", "sd9"), "unknown architecture 'sd9'; known are tiny"),
        (("--arch", "tiny", "--size", "100"), "not a positive multiple of 8; 96 is the nearest"),
        (("--arch", "tiny", "--masks", __file__), "is no .npz of masks"),
        (("--arch", "tiny", "--masks", "none.npz"), "none.npz"),
        (("--arch", "tiny", "--json", "no/such/folder/out.json"), "there is no folder"),
        (("--model", "no/such/folder"), "no folder of a diffusers pipeline"),
    ],
)
def test_what_cannot_be_counted_is_an_error(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["macs", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


@pytest.mark.parametrize("arguments", [(), ("--arch", "tiny", "--model", "x"), ("--arch", "tiny", "--edit-size", "0")])
def test_wrong_options_are_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["macs", *arguments])
    assert exit_.value.code == 2
    assert capsys.readouterr().err


def test_another_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "unet").mkdir()
    config: dict[str, Any] = {"_class_name": "UNet3DConditionModel"}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config))
    assert main(["macs", "--model", str(tmp_path)]) == 2
    assert "a UNet3DConditionModel cannot be counted" in capsys.readouterr().err
