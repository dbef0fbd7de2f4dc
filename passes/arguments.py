"""The arguments of an operation by name, as its operator's schema declares them, defaults included.

In a graph an argument may be given by position or by keyword, or be left out where it has a default. A pass that reads
``node.args[8]`` is wrong as soon as an argument is added before it; one that reads ``arguments_of(node)["residual"]``
is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.fx import Node
from torch.fx.operator_schemas import normalize_function


def arguments_of(node: Node) -> dict[str, Any]:
    """Every argument of an operation of a graph by name; one that is not given has its default.

    ``aten`` operators have their schemas' names, but ``self`` is called ``input``.

    Raises:
        ValueError: the node is no call of a registered operator, or its arguments do not fit the schema.
    """
    return named_arguments(node.target, node.args, node.kwargs)


def named_arguments(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`arguments_of`, for a call of the operator ``target`` with any kind of values.

    Raises:
        ValueError: ``target`` is no registered operator, or the arguments do not fit its schema.
    """
    named = normalize_function(target, tuple(args), dict(kwargs), normalize_to_only_use_kwargs=True)
    if named is None:
        raise ValueError(f"{target} has no schema that {len(args)} arguments and {sorted(kwargs)} fit")
    return dict(named.kwargs)


def call_form(target: Any, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name in the form that our graphs give them to one of our operators.

    Those that every call needs come by position, in the order of the schema; others by keyword, and only where they
    differ from their defaults.

    Raises:
        KeyError: an argument without a default is missing.
    """
    schema = target._schema.arguments
    args = tuple(arguments[each.name] for each in schema if not each.has_default_value())
    optional = {each.name: each.default_value for each in schema if each.has_default_value()}
    if unknown := set(arguments) - {each.name for each in schema}:
        raise ValueError(f"{target} has no arguments {sorted(unknown)}")
    kwargs = {name: arguments[name] for name in optional if arguments.get(name, optional[name]) != optional[name]}
    return args, kwargs
