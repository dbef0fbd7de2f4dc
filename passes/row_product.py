"""A product of rows in a graph, read and rewritten by the names of its arguments.

A *product of rows* multiplies rows ``[M, channels]`` with a weight and applies an epilogue to the result before it is
stored (``kernels/implicit_gemm/epilogue.py``). Five operators are products of rows, and they share most arguments:

    conv2d_rows           rows, halo, weight, bias, table; epilogue; shortcut, shortcut_weight
    conv2d_rows_and_norm  the same, and it returns the result before norm and activation as well
    linear_rows           rows, weight, bias; epilogue
    linear_rows_and_norm  the same, and it returns the result before norm and activation as well
    linear_rows_and_layer_norm  rows, weight, bias, residual, and the weight, bias and eps of the layer norm
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of, call_form

#: What an epilogue adds to a product or does to it, in the order in which it happens. ``count``, the number of rows
#: that are real, is no part of it: it changes no value.
EPILOGUE = ("sample", "sample_bias", "residual", "scale", "shift", "activation")


class RowProduct:
    """The arguments of one product of rows: ``product["weight"]`` reads one, ``rewrite(weight=...)`` sets it.

    Args:
        node: a call of one of ``targets.ROW_PRODUCTS``.

    Raises:
        ValueError: the node calls something else.
    """

    def __init__(self, node: Node) -> None:
        if node.target not in targets.ROW_PRODUCTS:
            raise ValueError(f"{node.name} calls {node.target}, which is no product of rows")
        self.node = node
        self.arguments: dict[str, Any] = arguments_of(node)

    def __getitem__(self, name: str) -> Any:
        """An argument by its name in the operator's schema. Raises KeyError where this operator has none such."""
        return self.arguments[name]

    @property
    def epilogue(self) -> dict[str, Any]:
        """What follows the sum of products, by name: those of :data:`EPILOGUE` that do something."""
        return {
            name: self.arguments[name] for name in EPILOGUE if self.arguments.get(name, "none") not in (None, "none")
        }

    def val(self, name: str) -> Any:
        """The tensor that stands for an argument's value in ``meta["val"]``; None for an argument that is None."""
        argument = self.arguments[name]
        return None if argument is None else argument.meta["val"]

    def rewrite(self, **arguments: Any) -> None:
        """Change arguments of the node in place; the result's shape has to stay what it is.

        Raises:
            ValueError: the operator has no argument of that name.
        """
        self.arguments.update(arguments)
        self.node.args, self.node.kwargs = call_form(self.node.target, self.arguments)
