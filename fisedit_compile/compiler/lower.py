"""Lowers a U-Net, or finds what was made of one of the same form: in this process, or on the disk.

Exporting a U-Net takes seconds, and depends on all of it but the values of its weights. So another checkpoint of the
same architecture takes the graphs that are there, which hold no weights; and another process reads the exported graph.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule

from fisedit_compile.compiler.export import export
from fisedit_compile.compiler.graph_folder import name_of, read_graph, write_graph
from fisedit_compile.compiler.lowered import Lowered, lower_graph, tensors_of, weights_in
from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.call import Call
from fisedit_compile.ir.meta_interpreter import on_meta
from fisedit_compile.passes.manager import SPARSE_PASSES, Pass
from fisedit_compile.passes.region.annotate_layout import annotate_layout
from fisedit_compile.utils.collecting_paused import collecting_paused

logger = logging.getLogger(__name__)

#: Graphs that are kept for further models. With all that is made of them, those of SD 2.1 take some 40 MB of the host,
#: and those of SDXL 90.
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
    holding: AbstractContextManager[None] | None = None,
) -> Lowered:
    """Export a U-Net for the signature of ``call`` and rewrite it into a sparse graph.

    Args:
        unet: the dense U-Net, on any device.
        call: a call of it.
        config: what to make sparse and how.
        passes: of ``manager.py``: what makes the sparse graph of the dense one.
        form: says all of the U-Net that its graphs depend on, see
            :meth:`~fisedit_compile.runtime.model_watch.ModelWatch.form`. With it the result is that of an earlier call,
            of this U-Net or another one, where all arguments were equal; and the exported graph is read from the disk
            where it is there. None: export it.
        holding: the context in which the U-Net is exported; what raises an error at its end is not kept.

    Raises:
        CaptureError: the U-Net cannot be exported as one graph.
        SparsifyError: no operation of it can be made sparse.
    """
    start = time.perf_counter()
    kind = f"{type(unet).__module__}.{type(unet).__qualname__}"
    key = (kind, form, torch.get_default_dtype(), call.signature, config, passes)
    if form is not None:
        with _lock:
            if key in _kept:
                _kept.move_to_end(key)
                return _kept[key]
    with collecting_paused():
        name = None if form is None else name_of(kind, form, call.signature)
        dense, constants = _dense_graph(unet, call, name, holding or nullcontext())
        annotate_layout(dense, config)
        lowered = lower_graph(call.signature, config, dense, passes, constants, start)
    if form is not None and not constants:  # which may be of this U-Net alone
        with _lock:
            _kept[key] = lowered
            while len(_kept) > _KEPT:
                _kept.popitem(last=False)
    return lowered


def _dense_graph(
    unet: torch.nn.Module, call: Call, name: str | None, holding: AbstractContextManager[None]
) -> tuple[GraphModule, Mapping[str, Tensor]]:
    """The dense graph, with weights on the meta device, and the values of those that are no tensors of the U-Net.

    Args:
        name: of the graph's file; None: there is none.
    """
    known = tensors_of(unet)
    if name is not None and (read := read_graph(name)) is not None and _fits(read, call, known):
        return read, {}
    with holding:
        exported = export(unet, call)
    tensors = {path: attrgetter(path)(exported) for path in weights_in(exported.graph)}
    constants = {path: tensor for path, tensor in tensors.items() if path not in known}
    dense = _LazyGraphModule({path: on_meta(tensor) for path, tensor in tensors.items()}, exported.graph)
    if name is not None and not constants:
        write_graph(name, dense)
    return dense, constants


def _fits(read: GraphModule, call: Call, known: Mapping[str, Tensor]) -> bool:
    """Whether a graph that was read takes the call's tensors and the U-Net's weights, as its name says that it does."""
    paths = weights_in(read.graph)
    taken = [node.meta["val"] for node in read.graph.find_nodes(op="placeholder")]
    taken += [attrgetter(path)(read) for path in paths]
    given = [*call.tensors, *(known[path] for path in paths if path in known)]
    fits = [(each.shape, each.dtype) for each in taken] == [(each.shape, each.dtype) for each in given]
    if not fits:
        logger.warning("a graph on the disk is not of this U-Net, as its name says: it is exported again")
    return fits
