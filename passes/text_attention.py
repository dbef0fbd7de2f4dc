"""The cross-attentions that read the prompt, and the tensors by which Prompt-to-Prompt control reaches them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fisedit_compile.passes import targets

#: The U-Net's argument for the embedded prompt.
_TEXT = "encoder_hidden_states"


def text_attentions(graph: Graph) -> list[Node]:
    """The attentions of an annotated dense graph whose queries lie in space and whose keys are the prompt's tokens.

    An IP-Adapter's attention to the tokens of a picture is none of them.
    """
    nodes = graph.find_nodes(op="call_function", target=targets.ATTENTION)
    text = [node.meta["val"].shape[1] for node in graph.find_nodes(op="placeholder") if node.target == _TEXT]
    return [node for node in nodes if reads_text(node) and (not text or _tokens(node) == text[0])]


def reads_text(attention: Node) -> bool:
    """Whether the queries of an attention lie in space and its keys do not."""
    query, key = attention.args[:2]
    return "layout" in query.meta and "layout" not in key.meta  # type: ignore[union-attr]


def control_vals(attention: Node) -> dict[str, Tensor]:
    """``meta["val"]`` of the base's maps of a cross-attention, and of the tensors of control, by kind.

    They have a sample of the pictures for each of the batch, as without classifier-free guidance, and maps of all
    tokens.
    """
    query = attention.args[0].meta["val"]  # type: ignore[union-attr]
    batch, heads, pixels, _ = query.shape
    tokens = _tokens(attention)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return {
        "maps": empty(batch * pixels, heads, tokens, dtype=query.dtype),
        "mapper": empty(batch, tokens, tokens),
        "keep": empty(batch, tokens),
        "weight": empty(batch, tokens),
        "span": empty(3, dtype=torch.int32),
    }


def _tokens(attention: Node) -> int:
    return int(attention.args[1].meta["val"].shape[2])  # type: ignore[union-attr]
