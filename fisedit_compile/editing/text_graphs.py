"""Text encoders as CUDA graphs: launching the layers of Stable Diffusion 2's takes 20 ms, running them two."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fisedit_compile.runtime.cuda_graph import GraphCapturer, copied
from fisedit_compile.runtime.model_state import ModelState

logger = logging.getLogger(__name__)

#: Runs an encoder on the tensors that it is called with.
_Run = Callable[[list[Tensor]], Any]

#: Graphs of one encoder: one for each number of texts that are encoded at once.
_MOST_GRAPHS = 8


@dataclass
class _Known:
    """Calls of an encoder in one state: those that were made, and the graphs of some; None where there can be none."""

    state: ModelState
    calls: set[Hashable] = field(default_factory=set)
    graphs: dict[Hashable, _Run | None] = field(default_factory=dict)


class TextGraphs:
    """Runs text encoders; one that is called again in the same state, with as many tokens, is captured.

    Only plain modules on a GPU are. All others run as they are, and so does what cannot be captured.
    """

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._capturers: dict[torch.device, GraphCapturer] = {}

    def run(self, name: str, encoder: nn.Module, state: ModelState, args: Any, kwargs: Any) -> Any:
        """The output of an encoder, in memory of its own.

        Args:
            name: of the part of the pipeline.
            encoder: the part.
            state: of the encoder as it is.
            args, kwargs: of its call.
        """
        known = self._known.get(name)
        if known is None or known.state is not state:  # weights that were exchanged lie elsewhere
            known = self._known[name] = _Known(state)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = str(tree), tuple(_shape(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        if key not in known.calls:
            known.calls.add(key)
        elif key not in known.graphs and len(known.graphs) < _MOST_GRAPHS:
            known.graphs[key] = self._graph(encoder, leaves, tree) if self._captures(encoder, tensors) else None
        graph = known.graphs.get(key)
        return encoder(*args, **kwargs) if graph is None else graph(tensors)

    def _captures(self, encoder: nn.Module, tensors: list[Tensor]) -> bool:
        return bool(tensors) and all(each.is_cuda for each in tensors) and is_plain(encoder)

    def _graph(self, encoder: nn.Module, leaves: list[Any], tree: Any) -> _Run | None:
        """What runs the encoder on tensors in the place of those among ``leaves``; None where it cannot be captured."""
        device = next(leaf.device for leaf in leaves if isinstance(leaf, Tensor))
        capturer = self._capturers.setdefault(device, GraphCapturer(device))
        with capturer.in_turn():
            own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs = [leaf for leaf in own if isinstance(leaf, Tensor)]
        args, kwargs = pytree.tree_unflatten(own, tree)

        try:
            with capturer.in_turn():
                replay = capturer.capture(lambda: encoder(*args, **kwargs))
        except RuntimeError as error:  # it reads a value of the device, for example
            logger.info("%s is not captured as a CUDA graph: %s", type(encoder).__name__, error)
            return None

        def run_graph(tensors: list[Tensor]) -> Any:
            with capturer.in_turn():
                torch._foreach_copy_(inputs, tensors)
                return copied(replay())

        return run_graph


def is_plain(encoder: nn.Module) -> bool:
    """Whether a module launches the same kernels at each call: nobody brings its weights, compiles or watches it."""
    for module in encoder.modules():
        attributes = vars(module)
        if any(attributes.get(name) is not None for name in ("forward", "_hf_hook", "_diffusers_hook")):
            return False
        if attributes.get("_compiled_call_impl") is not None or "_orig_mod" in module._modules:
            return False
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not all(_is_of_transformers(hook) for hook in hooks):
            return False
    return True


def _is_of_transformers(hook: Any) -> bool:
    """Whether it is one by which transformers itself collects hidden states."""
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def _shape(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, tensor.device
