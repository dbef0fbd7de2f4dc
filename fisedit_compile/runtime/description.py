"""What the modules, attention processors and hooks of a model hold: plain values and tensors, each by its path."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fisedit_compile.runtime.containers import Containers
from fisedit_compile.runtime.described_code import (
    code_digest,
    functions_of,
    global_names,
    members,
    qualified_name,
)
from fisedit_compile.runtime.plain_values import NAMED, SCALARS, canonical, is_opaque
from fisedit_compile.utils.libraries import is_library

_CONTAINERS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")

#: Attributes of every module that torch itself keeps, and those that say nothing about what a model computes.
_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"} | {
    *("_compiled_call_impl", "_is_torch_compile"),
    *("_diffusers_hook", "_hf_hook", "_old_forward", "_tome_info"),
    *("_hf_peft_config_loaded", "_safe_fusing", "lora_scale", "peft_config"),  # what counts of a LoRA is in its layers
    "_output_capturing_hooks_installed",
    *("gradient_checkpointing", "_gradient_checkpointing_func"),  # these change what a backward pass keeps
    *("name_or_path", "_weight_conversions"),  # where a text encoder's weights came from, and in what form
}

#: Where hooks come from that only collect what a model computes; transformers adds them at the first call that asks.
_COLLECTING = "transformers.utils.output_capturing"

_FREEU = frozenset({"s1", "s2", "b1", "b2"})


class Description:
    """A description of ``module`` as it is now.

    Attributes:
        values: path -> plain value, such as ``"mid_block.resnets.0.output_scale_factor": 1.0``.
        tensors: path -> parameter, buffer, or tensor that an attribute, a processor or a hook holds.
    """

    def __init__(self, module: nn.Module) -> None:
        self.values: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._first: dict[int, str] = {}  # id of a module or tensor that was met -> its path
        self._open: dict[int, str] = {}  # id of what is being described -> its path
        self._kept_alive: list[Any] = []  # so that no id is given twice
        self._containers = Containers()
        self._classes: set[type] = set()
        self._module(module, "")
        # What some users replace by a faster attention, for all processors at once.
        self._lookup(vars(nn.functional), "scaled_dot_product_attention", "torch.nn.functional")
        self._containers.remember()

    @cached_property
    def digest(self) -> str:
        """A hexadecimal digest of the values and of the names of the tensors, the same in every process."""
        return hashlib.sha256(repr((sorted(self.values.items()), list(self.tensors))).encode()).hexdigest()[:32]

    def is_current(self) -> bool:
        """Whether nothing has to be described again; values of tensors aside."""
        return self._containers.are_unchanged()

    def restore(self) -> None:
        """Put back into every container what it held when it was described."""
        self._containers.restore()

    def _module(self, module: nn.Module, path: str) -> None:
        if not self._is_new(module, path):
            return
        attributes = vars(module)
        if isinstance(module, GraphModule):  # its class is made anew for each, its attributes are about its code
            names = ["training"]
            self.values[f"{path}:code"] = hashlib.sha256(module.code.encode()).hexdigest()
        else:
            names = [name for name in attributes if name not in _BOOKKEEPING]
            self._class(type(module), path)
        self._containers.add_attributes(attributes, (*names, *_CONTAINERS))
        for name in _CONTAINERS:
            self._containers.add_dict(attributes[name])
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None:
                self._tensor(tensor, _join(path, name))
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = [item for item in attributes[kind].items() if getattr(item[1], "__module__", "") != _COLLECTING]
            for i, (key, hook) in enumerate(hooks):  # the keys count all hooks of the process
                self.values[f"{path}.{kind}[{i}]:kwargs"] = key in attributes[f"{kind}_with_kwargs"]
                self._value(hook, f"{path}.{kind}[{i}]")
        for name in names:
            if name == "_internal_dict":
                self._config(attributes[name], path)
            elif name == "scaling" and "_active_adapter" in attributes:
                self._scaling(module, path)
            elif not _says_nothing(module, name):
                self._value(attributes[name], _join(path, name))
        for name, child in module._modules.items():
            if child is not None:
                self._module(child, _join(path, name))

    def _scaling(self, layer: nn.Module, path: str) -> None:
        """The scales of a LoRA layer's active adapters; those of others do nothing."""
        scaling, active = vars(layer)["scaling"], vars(layer)["_active_adapter"]
        self._containers.add_dict(scaling)
        for name in [active] if isinstance(active, str) else active:
            if name in scaling:
                self._value(scaling[name], f"{path}.scaling[{name!r}]")

    def _config(self, config: Mapping[str, Any], path: str) -> None:
        """The arguments that a diffusers model was made with; names with an underscore say where it came from."""
        for name, value in config.items():
            if not name.startswith("_"):
                self.values[_join(path, f"config.{name}")] = canonical(value)

    def _value(self, value: Any, path: str) -> None:
        if type(value) in SCALARS:
            self.values[path] = canonical(value)
        elif isinstance(value, Tensor):
            self._tensor(value, path)
        elif isinstance(value, nn.Module):
            self._module(value, path)
        elif isinstance(value, (*NAMED, int, float, str)):
            self.values[path] = str(value)
        elif isinstance(value, tuple):
            self._sequence(value, path)
        elif isinstance(value, (list, dict, FunctionType)):
            self._within(value, path, self._function if isinstance(value, FunctionType) else self._container)
        elif isinstance(value, (set, frozenset)):
            self.values[path] = tuple(sorted(map(str, map(canonical, value))))
            if isinstance(value, set):
                self._containers.add_set(value)
        elif isinstance(value, BuiltinFunctionType):
            self.values[path] = qualified_name(value)
        elif isinstance(value, type):
            self.values[path] = qualified_name(value)
            self._class_code(value)
        elif isinstance(value, MethodType):
            self._value(value.__func__, path)
            self._value(value.__self__, f"{path}.__self__")
        elif isinstance(value, functools.partial):
            self.values[path] = "partial"
            for name in ("func", "args", "keywords"):
                self._value(getattr(value, name), f"{path}.{name}")
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            self._tensor(torch.from_numpy(value), path)
        else:
            self._within(value, path, self._object)

    def _within(self, value: Any, path: str, describe: Callable[[Any, str], None]) -> None:
        """Describe what may hold itself. What several processors share is described for each of them."""
        if id(value) in self._open:
            self.values[f"{path}:is"] = self._open[id(value)]
            return
        self._open[id(value)] = path
        self._kept_alive.append(value)
        describe(value, path)
        del self._open[id(value)]

    def _container(self, value: list[Any] | dict[Any, Any], path: str) -> None:
        if isinstance(value, list):
            self._containers.add_list(value)
            self._sequence(value, path)
        else:
            self._containers.add_dict(value)
            self._dict(value, path)

    def _sequence(self, value: Sequence[Any], path: str) -> None:
        if all(type(each) in SCALARS for each in value):
            self.values[path] = tuple(map(canonical, value))
            return
        self.values[path] = f"{len(value)} values"
        for i, each in enumerate(value):
            self._value(each, f"{path}[{i}]")

    def _dict(self, value: dict[Any, Any], path: str) -> None:
        self.values[path] = f"{len(value)} values"
        for i, (key, each) in enumerate(value.items()):
            self._value(each, f"{path}[{canonical(key)!r}]" if type(key) in SCALARS else f"{path}[{i}]")

    def _object(self, value: Any, path: str) -> None:
        self.values[path] = qualified_name(type(value))
        if is_opaque(value):
            return
        self._class(type(value), path)
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._containers.add_dict(attributes)
            for name, each in attributes.items():
                self._value(each, f"{path}.{name}")

    def _class(self, cls: type, path: str) -> None:
        self.values[f"{path}:class"] = qualified_name(cls)
        self._class_code(cls)

    def _class_code(self, cls: type) -> None:
        if cls in self._classes:
            return
        self._classes.add(cls)
        for owner, name, member in members(cls):
            self._containers.add_name(vars(owner), name)
            path = f"{qualified_name(owner)}.{name}"
            functions = list(functions_of(member))
            for function in functions:
                if qualified_name(function) != path or not is_library(owner.__module__):
                    self._within(function, f"class {path}", self._function)
            if not functions and not is_library(owner.__module__):
                self._value(member, f"class {path}")

    def _function(self, function: FunctionType, path: str) -> None:
        self.values[path] = qualified_name(function)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # a name that is not bound yet
                continue
            self._containers.add_cell(cell)
            self._value(content, f"{path}.{name}")
        if is_library(function.__module__):
            return
        self.values[f"{path}:code"] = code_digest(function.__code__)
        self._value(function.__defaults__, f"{path}:defaults")
        self._value(function.__kwdefaults__, f"{path}:keyword_defaults")
        names = dict.fromkeys(global_names(function.__code__))
        for name in names:
            found = function.__globals__.get(name, function)
            if not isinstance(found, ModuleType):
                if found is not function:
                    self._lookup(function.__globals__, name, path)
            elif not is_library(found.__name__):  # which of the names are looked up in it is not known
                for each in names:
                    if each in vars(found):
                        self._lookup(vars(found), each, f"{path}.{name}")

    def _lookup(self, names: Mapping[str, Any], name: str, path: str) -> None:
        """A name that a function looks up in its module when it is called."""
        self._containers.add_name(names, name)
        self._value(names[name], f"{path}.{name}")

    def _tensor(self, tensor: Tensor, path: str) -> None:
        if self._is_new(tensor, path):
            self.tensors[path] = tensor

    def _is_new(self, thing: Any, path: str) -> bool:
        """Whether this is met for the first time; later ones are described as that one."""
        first = self._first.setdefault(id(thing), path)
        if first is path:
            self._kept_alive.append(thing)
            return True
        self.values[f"{path}:is"] = first
        return False


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _says_nothing(module: nn.Module, name: str) -> bool:
    """Whether an attribute is as good as missing.

    FreeU leaves None where it was on, and transformers notes False of what it would have exchanged. Hooks that were
    taken off leave the class's own ``forward`` as an attribute; the hook of model offload brings weights to a device
    first, and calls it.
    """
    if name != "forward":
        value = vars(module)[name]
        return (name in _FREEU and value is None) or (name == "_use_kernels" and value is False)
    forward = vars(module)["forward"]
    plain = isinstance(forward, MethodType) and forward.__self__ is module
    return (plain and forward.__func__ is type(module).forward) or "_hf_hook" in vars(module)
