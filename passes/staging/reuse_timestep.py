"""Pass 9: values that depend on the timestep alone are taken from the base: the time embedding and its projections.

    %emb = linear(silu(linear(sinusoids(%timestep)...)));  %t = linear(silu(%emb), %w, %b);  add(%rows, %t[sample])
->  add(%rows, base_value_t[sample])

An edit repeats the timesteps of its base, so that one computation of these values, the base's, serves all edits. Where
they depend on the prompt as well, as with SDXL's pooled text, they stay in the step.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.requests import CacheEntry, Inputs
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import is_timestep, prune


def reuse_timestep(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Replace each value that depends on the timestep alone, and that others read, by the base's."""
    report = PassReport("reuse_timestep")
    graph = graph_module.graph
    inputs = Inputs(graph)
    constants: set[Node] = set()
    of_timestep: set[Node] = set()
    for node in graph.nodes:
        sources = [arg for arg in node.all_input_nodes if arg not in constants]
        if node.op == "placeholder" and is_timestep(node):
            of_timestep.add(node)
        elif node.op == "get_attr" or (node.op == "call_function" and not sources):
            constants.add(node)
        elif node.op == "call_function" and not node.meta.get("added") and of_timestep.issuperset(sources):
            of_timestep.add(node)  # the dense graph computes it, so that the base can keep it
    for node in [node for node in graph.nodes if node in of_timestep and node.op == "call_function"]:
        if all(user in of_timestep for user in node.users):
            continue
        entry = inputs(CacheEntry(node.name, "value"), node.meta["val"])
        node.replace_all_uses_with(entry, delete_user_cb=lambda user: user not in of_timestep)
        report.change(node)
    prune(graph)
    return report
