"""Says in text, module by module, what the compiler made of a U-Net."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from tabulate import tabulate
from torch import Tensor
from torch.fx import Node

from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.ir.layout import size_text
from fisedit_compile.macs.counter import MacCounter
from fisedit_compile.macs.report import NO_RESOLUTION, lineage
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.passes.pass_report import Change, Skip
from fisedit_compile.planning.apsc import CostModel

#: What the report calls an ATen operation. "" leaves out those that only regroup a value; all others are "pointwise".
_KINDS = {
    "conv2d": "conv",
    "linear": "linear",
    "scaled_dot_product_attention": "attention",
    "group_norm": "norm",
    "layer_norm": "norm",
    **dict.fromkeys(("cat", "chunk", "contiguous", "getitem", "permute", "reshape", "transpose", "view"), ""),
}

_ORDER = (*(kind for kind in dict.fromkeys(_KINDS.values()) if kind), "pointwise")

_UNITS = {"GMACs": 1e9, "MMACs": 1e6}

#: The passes that replace operations by those on rows.
_ROW_PASSES = ("sparsify_conv", "sparsify_norm", "sparsify_attention", "sparsify_pointwise")


def explain(lowered: Lowered, *, edit_size: float = 0.15, costs: CostModel | None = None) -> str:
    """Say what became sparse, what stayed dense and why, with the MACs of a dense call and of a sparse step.

    Args:
        lowered: the graphs of a U-Net, see :func:`fisedit_compile.compiler.lowered.lower`.
        edit_size: the share of the picture, in (0, 1], of the edit that is counted, a square in the middle.
        costs: predicts microseconds, by which ``blocks="measured"`` chooses the rows.

    Raises:
        ValueError: ``edit_size`` is outside (0, 1].
    """
    return "\n".join(_Explanation(lowered, edit_size, costs).lines())


class _Explanation:
    """Makes the parts of the text. Its table of modules has the lines that ``lineage`` gives for each module."""

    def __init__(self, lowered: Lowered, edit_size: float, costs: CostModel | None) -> None:
        self.lowered = lowered
        self.reports = {report.name: report for report in lowered.reports}
        counter = MacCounter(lowered, check=False, costs=costs)
        self.plan = counter.plan(square_mask(edit_size, counter.latents))
        self.dense, self.step = counter.dense, counter.step(self.plan)
        self.prompt, self.timestep = counter.prompt, counter.timestep
        self.unit = "GMACs" if self.dense.total >= 1e10 else "MMACs"
        self.kept = {entry: counter.shapes[entry] for entry in lowered.kept.cache_entries}
        self.on_rows = [change for name in _ROW_PASSES for change in self.reports[name].changes]

    def lines(self) -> Iterator[str]:
        config, shape = self.lowered.config, list(self.lowered.signature.sample_shape)
        yield (
            f"U-Net for latents {shape}, {config.attention} attention, dense_below={config.dense_below}, "
            f"blocks={config.blocks!r}"
        )
        yield from self._unknown()
        for part in (self._modules(), self._resolutions(), self._passes()):
            yield ""
            yield from part

    def _unknown(self) -> Iterator[str]:
        """Lines that name each operation which should have become one on rows but could not."""
        missed = Counter((each.module_path, each.op) for each in self.reports["select_region"].changes)
        missed.subtract((each.module_path, each.op) for each in self.on_rows)
        unknown = Counter(self.reports["annotate_layout"].skipped)
        unknown.update({Skip(*key, "no pass has a form of it on rows"): n for key, n in missed.items() if n > 0})
        if not unknown:
            yield "Every operation is known to the passes."
            return
        yield f"!! {sum(unknown.values())} operation(s) cannot run on rows and split the region:"
        yield from (f"!!   {skip}" + (f" ({count} times)" if count > 1 else "") for skip, count in unknown.items())

    def _modules(self) -> Iterator[str]:
        nodes = [node for node in self.lowered.dense.graph.nodes if node.op == "call_function"]
        paths = list(dict.fromkeys(path for node in nodes for path in lineage(_path(node))))
        sizes: dict[str, dict[str, None]] = defaultdict(dict)
        for node in nodes:
            if "layout" in node.meta and _kind(str(node.target)):
                sizes[lineage(_path(node))[-1]][size_text(node.meta["layout"].size)] = None
        rows, reasons = _grouped(self.on_rows), self._reasons()
        table: list[Sequence[str]] = [("module", "dense", "sparse", "ratio", "at", "runs")]
        for path in paths:
            dense, sparse = self.dense.of_module(path), self.step.of_module(path)
            runs = list(reasons[path])
            if kinds := Counter(kind for kind in (_kind(each.op) for each in rows[path]) if kind):
                runs.insert(0, "on rows: " + ", ".join(f"{kinds[kind]} {kind}" for kind in _ORDER if kinds[kind]))
            outer = lineage(path)[0]
            if not runs and (not path or not dense):
                continue  # views between modules, and numbers such as the frequencies of the time embedding
            if not runs and not any(other.startswith(f"{path}.") for other in paths):
                once = "once a base" if self.timestep.of_module(path) else "once an edit"
                runs.append("dense: it has no pixels" if sparse else once)
            name = (path if path == outer else "  " + path.removeprefix(f"{outer}.")) or "(U-Net)"
            numbers = self._macs(dense, sparse) if path else ("", "", "")
            table.append((name, *numbers, ", ".join(sizes[path]), runs[0] if runs else ""))
            table += [("", "", "", "", "", more) for more in runs[1:]]
        table.append(("total", *self._macs(self.dense.total, self.step.total), "", ""))
        share = float(self.plan.mask.double().mean())
        yield f"{self.unit} of a dense call and of a sparse step with {share:.1%} of the latents edited"
        alignment = ("left", *("right",) * 3, "left", "left")
        yield tabulate(table, tablefmt="plain", colalign=alignment, disable_numparse=True, preserve_whitespace=True)
        prompt, timestep = (each.total / _UNITS[self.unit] for each in (self.prompt, self.timestep))
        yield (
            f"Of a dense call, {prompt:,.2f} {self.unit} are for the prompt alone, once an edit, and {timestep:,.2f} "
            "for the timestep alone, once a base."
        )

    def _reasons(self) -> dict[str, dict[str, None]]:
        """By line of the table of modules, why operations run dense or on all pixels; each reason once."""
        reasons: dict[str, dict[str, None]] = defaultdict(dict)
        for skip in self.reports["select_region"].skipped:
            if _kind(skip.op):
                kind = "all pixels" if skip.reason.startswith("resolution ") else "dense"
                reasons[lineage(skip.module_path)[-1]][f"{kind}: {skip.reason.removeprefix('resolution ')}"] = None
        for skip in self.reports["annotate_layout"].skipped:
            reasons[lineage(skip.module_path)[-1]][f"dense: !! {skip.op}"] = None
        return reasons

    def _resolutions(self) -> Iterator[str]:
        """Lines with the rows, the MACs and what a base keeps, by resolution."""
        nodes = {node.name: node for node in self.lowered.dense.graph.nodes}
        kept: dict[str, list[Tensor]] = defaultdict(list)
        for entry, tensor in self.kept.items():
            layout = nodes[entry.node].meta.get("layout")
            kept[size_text(layout.size) if layout else NO_RESOLUTION].append(tensor)
        batch = self.plan.batch
        rows = {size_text(size): (count, batch * size[0] * size[1]) for size, count in self.plan.counts.items()}
        table: list[Sequence[str]] = [("resolution", "rows", "of", "", "dense", "sparse", "ratio", "kept", "MB")]
        for name, dense in self.dense.by_resolution.items():
            count, pixels = rows.get(name, (0, 0))
            cells = (f"{count:,}", f"{pixels:,}", f"{count / pixels:.1%}") if pixels else ("", "", "")
            base = (str(len(kept[name])), _megabytes(kept[name])) if kept[name] else ("", "")
            macs = self._macs(dense, self.step.by_resolution.get(name, 0))
            table.append(("no pixels" if name == NO_RESOLUTION else name, *cells, *macs, *base))
        yield f"By resolution: rows of the edit, {self.unit}, and the tensors that the base keeps of each call"
        yield tabulate(table, tablefmt="plain", stralign="right", colalign=("left",), disable_numparse=True)
        kinds = Counter(entry.kind for entry in self.kept)
        yield (
            f"The base keeps {kinds['map']} maps, {kinds['scale']} group norms and {kinds['value']} values of the "
            f"timestep a call, {_megabytes(self.kept.values())} MB."
        )
        if maps := len(self.lowered.kept.controlled_entries):
            yield f"For control it also keeps the maps of {maps} cross-attentions, of the prompt's own words."

    def _passes(self) -> Iterator[str]:
        table: list[Sequence[str]] = [("pass", "changed", "skipped", "ms")]
        for report in self.lowered.reports:
            table.append((report.name, str(report.changed), str(len(report.skipped)), f"{report.seconds * 1e3:.0f}"))
        yield tabulate(table, tablefmt="plain", stralign="right", colalign=("left",), disable_numparse=True)
        yield f"Exported and rewritten in {self.lowered.build_seconds:.1f} s."

    def _macs(self, dense: int, sparse: int) -> tuple[str, str, str]:
        unit = _UNITS[self.unit]
        return f"{dense / unit:,.2f}", f"{sparse / unit:,.2f}", f"{dense / sparse:.1f}x" if sparse else "-"


def _grouped(changes: Iterable[Change]) -> dict[str, list[Change]]:
    groups: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        groups[lineage(change.module_path)[-1]].append(change)
    return groups


def _path(node: Node) -> str:
    return str(node.meta.get("module_path", ""))


def _kind(op: str) -> str:
    """What :data:`_KINDS` calls an operation, such as ``aten.conv2d.default`` or ``<built-in function getitem>``."""
    name = op.rstrip(">").split()[-1] if op.startswith("<") else op.split(".")[1]
    return _KINDS.get(name, "pointwise")


def _megabytes(tensors: Iterable[Tensor]) -> str:
    return f"{sum(tensor.nbytes for tensor in tensors) / 1e6:,.1f}"
