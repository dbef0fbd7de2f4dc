"""What this project uses of torch and diffusers that they promise to nobody, all of it, and a test of each.

Where one of these tests fails after an upgrade, the interface has gone or changed: mend what uses it (search the
sources for the name) before anything else. ``test_all_are_listed`` finds what is used and not listed here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("fisedit_compile", "passes", "kernels", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not {ROOT / "fisedit_compile" / link for link in ("passes", "kernels")} & set(path.parents)
]

LISTED: set[str] = set()

aten = torch.ops.aten


def uses(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks the test of some private names, and lists them."""
    LISTED.update(names)
    return lambda test: test


@uses("_inductor")
def test_the_options_and_modes_of_inductor_are_listed() -> None:
    from torch._inductor import list_mode_options, list_options

    assert "max_autotune" in list_options()
    assert list_mode_options()["reduce-overhead"]["triton.cudagraphs"] is True


@uses("_pytree")
def test_nested_arguments_flatten_and_come_back() -> None:
    from torch.utils import _pytree as pytree

    given = {"sample": 1, "residuals": (2, [3, None])}
    leaves, spec = pytree.tree_flatten(given)
    assert isinstance(spec, pytree.TreeSpec)
    assert leaves == pytree.tree_leaves(given) == [1, 2, 3, None]
    assert pytree.tree_unflatten(leaves, spec) == pytree.tree_map(lambda leaf: leaf, given) == given


@uses("_ops", "_schema", "_overloadname")
def test_an_operator_says_its_name_and_what_it_writes() -> None:
    for target, name, overload, mutable in (
        (aten.add.Tensor, "aten::add", "Tensor", False),
        (aten.add_.Tensor, "aten::add_", "Tensor", True),
    ):
        assert isinstance(target, torch._ops.OpOverload)
        assert (target._schema.name, target._overloadname, target._schema.is_mutable) == (name, overload, mutable)
    argument = aten.add.Tensor._schema.arguments[2]
    assert (argument.name, argument.has_default_value(), argument.default_value) == ("alpha", True, 1)
    assert [each.alias_info is None for each in aten.add.Tensor._schema.returns] == [True]
    assert [each.alias_info is None for each in aten.view.default._schema.returns] == [False]


@uses("_dynamo")
def test_inductor_is_found_by_name_and_dynamo_counts_graphs() -> None:
    from torch._dynamo.utils import counters

    assert callable(torch._dynamo.lookup_backend("inductor"))
    before = counters["stats"]["unique_graphs"]
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(2))
    assert counters["stats"]["unique_graphs"] == before + 1


@uses("_orig_mod")
def test_a_compiled_module_holds_the_one_that_it_was_made_of() -> None:
    module = nn.Linear(2, 2)
    assert torch.compile(module)._orig_mod is module


@uses("_compiled_call_impl")
def test_a_module_that_was_compiled_in_place_says_so() -> None:
    module = nn.Linear(2, 2)
    assert vars(module).get("_compiled_call_impl") is None
    module.compile()
    assert vars(module)["_compiled_call_impl"] is not None


@uses("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
def test_a_module_keeps_its_parts_in_dictionaries() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    norm = module._modules["0"]
    assert norm is module[0]
    assert norm._parameters["weight"] is norm.weight
    assert norm._buffers["running_mean"] is norm.running_mean
    hooks = [norm.register_forward_hook(print), norm.register_forward_pre_hook(print)]
    assert [*norm._forward_hooks.values(), *norm._forward_pre_hooks.values()] == [print, print]
    for hook in hooks:
        hook.remove()
    assert not norm._forward_hooks


@uses("_version")
def test_a_tensor_counts_what_is_written_to_it() -> None:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1


@uses("_lazy_graph_module", "_LazyGraphModule", "_use_lazy_graph_module")
def test_the_code_of_a_graph_is_written_when_it_is_needed() -> None:
    from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    with _use_lazy_graph_module(True):
        traced = torch.fx.symbolic_trace(double)
    assert isinstance(traced, _LazyGraphModule)
    assert not isinstance(torch.fx.symbolic_trace(double), _LazyGraphModule)
    assert traced._needs_recompile()
    assert traced(torch.ones(1)) == 2
    traced.recompile()
    assert traced._needs_recompile()
    _LazyGraphModule.force_recompile(traced)
    assert not traced._needs_recompile()


@uses("_foreach_copy_")
def test_many_tensors_are_copied_at_once() -> None:
    targets = [torch.zeros(2), torch.zeros(3)]
    torch._foreach_copy_(targets, [torch.ones(2), torch.ones(3)])
    assert all((target == 1).all() for target in targets)


@uses("_subclasses")
def test_fake_tensors_are_recognised() -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        assert isinstance(torch.zeros(2), FakeTensor)


@uses("_python_dispatch")
def test_a_mode_sees_each_operator() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **kwargs or {})

    seen: list[Any] = []
    x = torch.ones(2)
    with Seen():
        torch.add(x, x)
    assert seen == [aten.add.Tensor]


@uses(
    "_C",
    "_get_tracing_state",
    "_set_tracing_state",
    "_dispatch_tls_set_dispatch_key_excluded",
    "_AutoDispatchBelowADInplaceOrView",
)
def test_a_trace_can_be_left_and_taken_up_again() -> None:
    class Module(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            trace = torch._C._get_tracing_state()
            assert trace is not None
            torch._C._dispatch_tls_set_dispatch_key_excluded("Tracer", False)
            torch._C._set_tracing_state(None)
            with torch._C._AutoDispatchBelowADInplaceOrView():
                sizes.append(type(x.shape[0]))
                torch.mul(x, x)
            torch._C._set_tracing_state(trace)
            return x + 1

    sizes: list[type] = []
    graph, _ = torch.jit._get_trace_graph(Module(), torch.ones(2))  # as fvcore traces
    assert sizes == [int]  # a traced tensor while the tracer is on
    kinds = {node.kind() for node in graph.nodes()}
    assert "aten::add" in kinds
    assert "aten::mul" not in kinds


OPERATORS = (
    "_convolution",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_assert_tensor_metadata",
    "_to_copy",
    "_unsafe_view",
)


@uses(*OPERATORS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_that_graphs_may_hold_exist(name: str) -> None:
    assert isinstance(getattr(aten, name).default, torch._ops.OpOverload)


@uses("_callback_tensor_inputs", "_interrupt")
def test_a_pipeline_says_what_its_callbacks_may_ask_for_and_can_be_interrupted() -> None:
    from diffusers import StableDiffusionPipeline

    assert {"latents", "prompt_embeds"} <= set(StableDiffusionPipeline._callback_tensor_inputs)
    assert isinstance(StableDiffusionPipeline.interrupt, property)
    pipe = object.__new__(StableDiffusionPipeline)
    object.__setattr__(pipe, "_interrupt", True)
    assert StableDiffusionPipeline.interrupt.fget(pipe) is True


@uses("_execution_device")
def test_a_pipeline_says_where_it_runs() -> None:
    from support.pipelines import tiny_pipeline

    assert tiny_pipeline()._execution_device == torch.device("cpu")


@uses("_use_kernels")
def test_a_loaded_text_encoder_notes_that_no_kernels_are_exchanged(tmp_path: Path) -> None:
    from support.pipelines import tiny_pipeline
    from transformers import CLIPTextModel

    tiny_pipeline().text_encoder.save_pretrained(tmp_path)
    assert vars(CLIPTextModel.from_pretrained(tmp_path))["_use_kernels"] is False


@uses("_hf_hook")
def test_accelerate_notes_its_hook_on_the_module_and_keeps_the_class_s_name() -> None:
    from accelerate import cpu_offload_with_hook

    module = nn.Linear(2, 2)
    cpu_offload_with_hook(module, torch.device("cpu"))
    assert type(vars(module)["_hf_hook"]).__name__ == "CpuOffload"
    assert "forward" in vars(module)


@uses("_diffusers_hook", "_internal_dict")
def test_diffusers_notes_hooks_and_configuration_on_the_model() -> None:
    from diffusers import UNet2DConditionModel
    from diffusers.hooks import apply_layerwise_casting
    from support.unets import MICRO

    unet = UNet2DConditionModel(**MICRO)
    assert vars(unet)["_internal_dict"]["sample_size"] == unet.config.sample_size == MICRO["sample_size"]
    apply_layerwise_casting(unet, torch.float16, torch.float32)
    hooked = [vars(module)["_diffusers_hook"] for module in unet.modules() if "_diffusers_hook" in vars(module)]
    assert hooked
    assert all("layerwise_casting" in each.hooks for each in hooked)


@uses("_active_adapter")
def test_an_adapter_layer_notes_which_of_its_adapters_are_active() -> None:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig
    from support.unets import MICRO

    unet = UNet2DConditionModel(**MICRO)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="snow")
    layers = [vars(module) for module in unet.modules() if "_active_adapter" in vars(module)]
    assert layers
    assert all(layer["_active_adapter"] in ("snow", ["snow"]) and "snow" in layer["scaling"] for layer in layers)


@uses("_class_name")
def test_a_saved_model_names_its_class(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from support.unets import MICRO

    UNet2DConditionModel(**MICRO).save_config(tmp_path)
    assert UNet2DConditionModel.load_config(tmp_path)["_class_name"] == "UNet2DConditionModel"


def test_all_are_listed() -> None:
    own = {name for path in SOURCES for name in own_names(ast.parse(path.read_text()))}
    found = {
        (name, f"{path.relative_to(ROOT)}:{line}")
        for path in SOURCES
        for name, line in private_names(ast.parse(path.read_text()))
        if name not in own | {"_asdict"}  # a method of named tuples
    }
    assert {name for name, _ in found} >= {"_pytree", "_schema"}, "nothing is found: this test is broken"
    missing = sorted(where for where in found if where[0] not in LISTED)
    assert not missing, "private names of a library: use a public one, or add a test of each to this file"


def own_names(tree: ast.Module) -> Iterator[str]:
    """Names that the project gives to its own functions, classes and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def private_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Private names, with their lines, that are read from anything but ``self``, or imported."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and not is_self(node.value):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            names = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            names = strings(node.args[:1])
        elif isinstance(node, ast.Subscript):
            names = strings([node.slice])
        elif isinstance(node, ast.Compare):
            names = strings([node.left, *node.comparators])
        yield from (
            (name, node.lineno) for name in names if name.isidentifier() and name[0] == "_" and name[:2] != "__"
        )


def strings(nodes: Sequence[ast.expr]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
