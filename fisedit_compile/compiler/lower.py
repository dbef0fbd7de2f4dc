"""Lowers a U-Net, or finds that one of the same form was lowered before in this process.

Exporting a U-Net and rewriting its graph takes seconds, and depends on all of it but the values of its weights. So
another checkpoint of the same architecture takes the graphs that are there, which hold no weights.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from operator import attrgetter

import torch
from torch.fx._lazy_graph_module import _LazyGraphModule

from fisedit_compile.compiler.export import export
from fisedit_compile.compiler.lowered import Lowered, lower_graph, weights_in
from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.call import Call
from fisedit_compile.ir.meta_interpreter import on_meta
from fisedit_compile.passes.manager import SPARSE_PASSES, Pass
from fisedit_compile.passes.region.annotate_layout import annotate_layout
from fisedit_compile.utils.collecting_paused import collecting_paused

#: Graphs that are kept for further models; those of a large U-Net take some ten megabytes of the host each.
_KEPT = 8

_kept: OrderedDict[object, Lowered] = OrderedDict()
_lock = threading.Lock()


def lower(
    unet: torch.nn.Module,
    call: Call,
    config: SparsityConfig,
    passes: tuple[Pass, ...] = SPARSE_PASSES,
    *,
    form: str | None = None,
) -> Lowered:
    """Export a U-Net for the signature of ``call`` and rewrite it into a sparse graph.

    Args:
        unet: the dense U-Net, on any device.
        call: a call of it.
        config: what to make sparse and how.
        passes: of ``manager.py``: what makes the sparse graph of the dense one.
        form: says all of the U-Net that its graphs depend on, see
            :meth:`~fisedit_compile.runtime.model_watch.ModelWatch.form`. With it the result is that of an earlier call,
            of this U-Net or another one, where all arguments were equal. None: make it.

    Raises:
        CaptureError: the U-Net cannot be exported as one graph.
        SparsifyError: no operation of it can be made sparse.
    """
    if form is None:
        return _lowered(unet, call, config, passes)
    kind = f"{type(unet).__module__}.{type(unet).__qualname__}"
    key = (kind, form, torch.get_default_dtype(), call.signature, config, passes)
    with _lock:
        if key in _kept:
            _kept.move_to_end(key)
            return _kept[key]
    lowered = _lowered(unet, call, config, passes)
    if not lowered.constants:  # which may be of this U-Net alone
        with _lock:
            _kept[key] = lowered
            while len(_kept) > _KEPT:
                _kept.popitem(last=False)
    return lowered


def _lowered(unet: torch.nn.Module, call: Call, config: SparsityConfig, passes: tuple[Pass, ...]) -> Lowered:
    start = time.perf_counter()
    with collecting_paused():
        exported = export(unet, call)
        tensors = {path: attrgetter(path)(exported) for path in weights_in(exported.graph)}
        dense = _LazyGraphModule({path: on_meta(tensor) for path, tensor in tensors.items()}, exported.graph)
        annotate_layout(dense, config)
        named = {path for path, _ in unet.named_parameters(remove_duplicate=False)}
        named |= {path for path, _ in unet.named_buffers(remove_duplicate=False)}
        constants = {path: tensor for path, tensor in tensors.items() if path not in named}
        return lower_graph(call.signature, config, dense, passes, constants, start)
