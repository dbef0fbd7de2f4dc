"""What all row operators share: registration, opcheck, one graph for every number of rows, inputs left alone."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.random_rows import DTYPES, normal
from torch._dynamo.testing import CompileCounterWithBackend

import fisedit_compile.kernels.ops
from fisedit_compile.planning.edit_plan import row_of_pixels
from fisedit_compile.testing import assert_close

Arguments = dict[str, Any]
BATCH, SIZE, CHANNELS, HEADS = 2, 4, 6, 3
PIXELS = BATCH * SIZE * SIZE


def chosen(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [M, C] at random pixels of a batch of two: (rows, index, sample, offsets)."""
    index = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(rows))[:rows].sort().values
    sample = index // (SIZE * SIZE)
    first = int((sample == 0).sum())
    return normal(rows, CHANNELS, dtype=dtype, seed=rows), index, sample, torch.tensor([0, first, rows]).int()


def gather_rows(rows: int, dtype: torch.dtype) -> Arguments:
    x = normal(BATCH, CHANNELS, SIZE, SIZE, dtype=dtype, seed=1)
    return {"x": x, "index": chosen(rows, dtype)[1], "order": [0, 2, 3, 1], "pixel_dims": 3}


def scatter_rows(rows: int, dtype: torch.dtype) -> Arguments:
    x, index, _, _ = chosen(rows, dtype)
    base, shape = normal(PIXELS, CHANNELS, dtype=dtype, seed=1), [BATCH, CHANNELS, SIZE, SIZE]
    return {"rows": x, "base": base, "index": index, "shape": shape, "order": [0, 2, 3, 1], "pixel_dims": 3}


def conv2d_rows(rows: int, dtype: torch.dtype) -> Arguments:
    x, halo = chosen(rows, dtype)[0], normal(rows + 3, CHANNELS, dtype=dtype, seed=1)
    weight, bias = normal(8, 9 * CHANNELS, dtype=dtype, seed=2), normal(8, dtype=dtype, seed=3)
    generator = torch.Generator().manual_seed(rows)
    table = torch.randint(-1, 2 * rows + 3, (rows + 1, 9), generator=generator).int()
    return {"rows": x, "halo": halo, "weight": weight, "bias": bias, "table": table}


def conv2d_rows_without_halo(rows: int, dtype: torch.dtype) -> Arguments:
    arguments = conv2d_rows(rows, dtype)
    table = arguments["table"].clamp_max(rows - 1)
    return arguments | {"halo": None, "bias": None, "table": table}


def conv2d_rows_with_shortcut(rows: int, dtype: torch.dtype) -> Arguments:
    shortcut, weight = normal(rows + 1, 5, dtype=dtype, seed=4), normal(8, 5, dtype=dtype, seed=5)
    return conv2d_rows(rows, dtype) | {"activation": "geglu", "shortcut": shortcut, "shortcut_weight": weight}


def conv2d_rows_and_norm_with_shortcut(rows: int, dtype: torch.dtype) -> Arguments:
    return conv2d_rows_with_shortcut(rows, dtype) | epilogue(rows + 1, 8, dtype) | {"activation": "silu"}


def conv2d_rows_and_norm(rows: int, dtype: torch.dtype) -> Arguments:
    arguments = conv2d_rows(rows, dtype)
    return arguments | epilogue(rows + 1, 8, dtype) | {"activation": "silu"}


def linear_rows(rows: int, dtype: torch.dtype) -> Arguments:
    weight, bias = normal(8, CHANNELS, dtype=dtype, seed=2), normal(8, dtype=dtype, seed=3)
    return {"rows": chosen(rows, dtype)[0], "weight": weight, "bias": bias, "count": count_of(rows)}


def linear_rows_geglu(rows: int, dtype: torch.dtype) -> Arguments:
    return linear_rows(rows, dtype) | {"activation": "geglu"}


def linear_rows_and_norm(rows: int, dtype: torch.dtype) -> Arguments:
    return linear_rows(rows, dtype) | epilogue(rows, 8, dtype)


def epilogue(rows: int, width: int, dtype: torch.dtype) -> Arguments:
    sample = torch.arange(rows) * BATCH // max(rows, 1)
    scale, shift = scale_and_shift(width, dtype)
    time, residual = normal(BATCH, width, dtype=dtype, seed=5), normal(rows, width, dtype=dtype, seed=6)
    return {"sample": sample, "sample_bias": time, "residual": residual, "scale": scale, "shift": shift}


def scale_and_shift(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return normal(BATCH, width, dtype=wide, seed=7), normal(BATCH, width, dtype=wide, seed=8)


def count_of(rows: int) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32)


def group_norm_rows(rows: int, dtype: torch.dtype) -> Arguments:
    x, _, sample, _ = chosen(rows, dtype)
    scale, shift = scale_and_shift(CHANNELS, dtype)
    return {"rows": x, "sample": sample, "scale": scale, "shift": shift, "silu": True, "count": count_of(rows)}


def group_norm_whole(rows: int, dtype: torch.dtype) -> Arguments:
    x = normal(BATCH * (rows + 1), CHANNELS, dtype=dtype, seed=rows)
    weight, bias = (normal(CHANNELS, dtype=dtype, seed=seed) for seed in (3, 4))
    return {"rows": x, "samples": BATCH, "groups": 2, "weight": weight, "bias": bias, "eps": 1e-5, "silu": True}


def layer_norm_rows(rows: int, dtype: torch.dtype) -> Arguments:
    weight, bias = (normal(CHANNELS, dtype=dtype, seed=seed) for seed in (3, 4))
    return {"rows": chosen(rows, dtype)[0], "weight": weight, "bias": bias, "eps": 1e-5, "count": count_of(rows)}


def linear_rows_and_layer_norm(rows: int, dtype: torch.dtype) -> Arguments:
    norm_weight, norm_bias = (normal(5, dtype=dtype, seed=seed) for seed in (3, 4))
    return {
        "rows": chosen(rows, dtype)[0], "weight": normal(5, CHANNELS, dtype=dtype, seed=1), "bias": None,
        "residual": normal(rows, 5, dtype=dtype, seed=2), "norm_weight": norm_weight, "norm_bias": norm_bias,
        "eps": 1e-5, "count": count_of(rows),
    }  # fmt: skip


def cat_norm_rows(rows: int, dtype: torch.dtype) -> Arguments:
    x, _, sample, _ = chosen(rows, dtype)
    scale, shift = scale_and_shift(CHANNELS + 4, dtype)
    right = normal(rows, 4, dtype=dtype, seed=rows + 1)
    return {"left": x, "right": right, "sample": sample, "scale": scale, "shift": shift, "silu": True}


def attention_rows(rows: int, dtype: torch.dtype) -> Arguments:
    offsets = chosen(rows, dtype)[3]
    q, k, v = (normal(rows, HEADS, 4, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    return {"q": q, "k": k, "v": v, "q_offsets": offsets, "k_offsets": offsets.clone(), "scale": None}


def attention_cached(rows: int, dtype: torch.dtype) -> Arguments:
    _, index, _, offsets = chosen(rows, dtype)
    q, k, v = (normal(rows, HEADS, 4, dtype=dtype, seed=seed) for seed in (1, 2, 3))
    base_k, base_v = (normal(PIXELS, HEADS, 4, dtype=dtype, seed=seed) for seed in (4, 5))
    row_of = row_of_pixels(index, PIXELS)
    return {
        "q": q, "k": k, "v": v, "base_k": base_k, "base_v": base_v, "row_of": row_of, "offsets": offsets, "scale": 0.3
    }  # fmt: skip


EXAMPLES: list[Callable[[int, torch.dtype], Arguments]] = [
    gather_rows,
    scatter_rows,
    conv2d_rows,
    conv2d_rows_without_halo,
    conv2d_rows_and_norm,
    conv2d_rows_with_shortcut,
    conv2d_rows_and_norm_with_shortcut,
    linear_rows,
    linear_rows_geglu,
    linear_rows_and_norm,
    linear_rows_and_layer_norm,
    group_norm_rows,
    group_norm_whole,
    layer_norm_rows,
    cat_norm_rows,
    attention_rows,
    attention_cached,
]
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)


def op_of(example: Callable[..., Arguments]) -> Any:
    name = example.__name__.removesuffix("_without_halo").removesuffix("_geglu").removesuffix("_with_shortcut")
    return getattr(torch.ops.fisedit, name).default


def results(result: Any) -> tuple[torch.Tensor, ...]:
    """The one result of an operator, or both."""
    return result if isinstance(result, tuple) else (result,)


def dynamic_dims(few: Arguments, many: Arguments) -> dict[str, list[int]]:
    """The dimensions of each tensor argument that depend on the number of rows."""
    tensors = {name: value for name, value in few.items() if isinstance(value, torch.Tensor)}
    return {
        name: [dim for dim in range(value.ndim) if value.shape[dim] != many[name].shape[dim]]
        for name, value in tensors.items()
    }


@each_example
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_opcheck(example: Callable[..., Arguments], dtype: torch.dtype, rows: int) -> None:
    torch.library.opcheck(op_of(example), (), example(rows, dtype))


@each_example
def test_fake_gives_shape_strides_and_dtype_of_the_result(example: Callable[..., Arguments]) -> None:
    for rows in (1, 5):
        arguments = example(rows, torch.float16)
        real = op_of(example)(**arguments)
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        fake = op_of(example)(**meta)
        for guess, true in zip(results(fake), results(real), strict=True):
            assert (guess.shape, guess.stride(), guess.dtype) == (true.shape, true.stride(), true.dtype)


@each_example
def test_inputs_are_neither_written_nor_returned(example: Callable[..., Arguments]) -> None:
    arguments, before = example(6, torch.float32), example(6, torch.float32)
    storages = {result.untyped_storage().data_ptr() for result in results(op_of(example)(**arguments))}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name]), f"{name} was written"
            assert value.untyped_storage().data_ptr() not in storages, f"the result is a view of {name}"


@each_example
@pytest.mark.parametrize("dynamic", [True, None])
def test_compiles_once_for_every_number_of_rows(example: Callable[..., Arguments], dynamic: bool | None) -> None:
    torch.compiler.reset()
    op, counter = op_of(example), CompileCounterWithBackend("aot_eager")
    few, many = example(5, torch.float32), example(6, torch.float32)
    dims = dynamic_dims(few, many)
    fixed = {name: value for name, value in few.items() if name not in dims}

    @torch.compile(backend=counter, fullgraph=True, dynamic=dynamic)
    def call(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return results(op(**tensors, **fixed))[-1] * 2

    compiled = 0
    for rows in (11, 9, 2, 30, 17):  # the first unlike every other size: dynamic=True ties equal sizes together
        arguments = example(rows, torch.float32)
        if dynamic is None:
            for name, which in dims.items():
                torch._dynamo.mark_dynamic(arguments[name], which)
        out = call({name: arguments[name] for name in dims})
        assert_close(out, results(op(**example(rows, torch.float32)))[-1].double() * 2)
        # Under dynamic=True the first call compiles twice where it meets a float (the attention's scale).
        compiled = compiled or counter.frame_count
        assert counter.frame_count == compiled


@each_example
def test_one_exported_program_serves_every_number_of_rows(example: Callable[..., Arguments]) -> None:
    op = op_of(example)
    few, many = example(5, torch.float32), example(6, torch.float32)
    dims = dynamic_dims(few, many)
    fixed = {name: value for name, value in few.items() if name not in dims}

    class Call(torch.nn.Module):
        def forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
            return results(op(**tensors, **fixed))[-1] * 2

    dynamic = {name: dict.fromkeys(which, torch.export.Dim.DYNAMIC) for name, which in dims.items()}
    exported = torch.export.export(
        Call(), ({name: few[name] for name in dims},), dynamic_shapes=(dynamic,), strict=False
    )
    assert next(node.target for node in exported.graph.nodes if node.op == "call_function") is op
    for rows in (2, 30):
        arguments = example(rows, torch.float32)
        out = exported.module()({name: arguments[name] for name in dims})
        assert_close(out, results(op(**arguments))[-1].double() * 2)


def test_importing_again_changes_nothing() -> None:
    before = [op_of(example) for example in EXAMPLES]
    importlib.reload(fisedit_compile.kernels.ops)
    assert [op_of(example) for example in EXAMPLES] == before
    test_opcheck(group_norm_rows, torch.float32, 3)


def test_registration_imports_neither_triton_nor_diffusers() -> None:
    code = (
        "import sys, fisedit_compile.kernels.ops\n"
        "found = {'triton', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
