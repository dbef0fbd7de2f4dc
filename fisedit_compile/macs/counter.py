"""Counts the multiply-accumulates (MACs) of a U-Net call and of a sparse step.

Counting runs on the meta device, where nothing is computed and no weight is read. docs/macs.md says what is counted and
by which conventions.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from diffusers import UNet2DConditionModel
from torch import Tensor

from fisedit_compile.architectures import VAE_SCALE_FACTOR, build_unet, latent_size, unet_inputs
from fisedit_compile.compiler.export import export
from fisedit_compile.compiler.lower import lower
from fisedit_compile.compiler.lowered import Lowered, copy_graph
from fisedit_compile.config import AttentionMode, SparsityConfig
from fisedit_compile.cost_model.row_costs import RowCosts
from fisedit_compile.ir.call import Call, bind
from fisedit_compile.macs.report import MacCount, MacReport
from fisedit_compile.macs.walk import GraphCounter, count_graph
from fisedit_compile.masks.sample_masks import latent_mask, square_mask
from fisedit_compile.masks.user_mask import MaskLike
from fisedit_compile.passes.region.annotate_layout import annotate_layout
from fisedit_compile.passes.rewriting import prune
from fisedit_compile.planning.apsc import CostModel
from fisedit_compile.planning.edit_plan import EditPlan

__all__ = [
    "MacCount",
    "MacCounter",
    "MacReport",
    "count_dense",
    "count_graph",
    "count_macs",
    "count_prompt",
    "count_step",
]


def count_macs(
    unet_or_model: Any,
    *,
    height: int,
    width: int,
    batch: int = 2,
    mask: MaskLike | None = None,
    edit_size: float | None = None,
    attention: AttentionMode | None = None,
    config: SparsityConfig | dict[str, Any] | None = None,
) -> MacReport:
    """MACs of one call of a U-Net for images of ``height`` x ``width`` pixels; with an edit, of its sparse steps, too.

    For several edits of one model make one :class:`MacCounter`, which exports the U-Net only once.

    Args:
        unet_or_model: a U-Net, a pipeline with one, or the name of an architecture
            (:data:`fisedit_compile.architectures.ARCHITECTURES`).
        height: height of the image in pixels; a U-Net on its own is taken to see latents of an eighth of that.
        width: width of the image in pixels.
        batch: samples of the call; classifier-free guidance takes two for each image.
        mask: the mask of an edit, see :meth:`MacCounter.report`.
        edit_size: the edit instead of a mask: a square in the middle with this share of the picture, in (0, 1].
        attention: ``"full"`` or ``"masked"``; None leaves it to ``config``.
        config: what becomes sparse and how; None takes the defaults.

    Raises:
        ValueError: the architecture is unknown, the model has no U-Net, the image is no whole number of latent pixels,
            the edit size is outside (0, 1], or both mask and edit size are given.
        MaskError: the mask has other proportions than the image.
        CaptureError: the U-Net cannot be exported as one graph, or has an operation that cannot be counted.
        SparsifyError: an edit is given, and no operation can be made sparse.
    """
    sparsity = _config(config, attention)
    unet, scale_factor = _unet_of(unet_or_model)
    call = _call(unet, scale_factor, height=height, width=width, batch=batch)
    if mask is None and edit_size is None:
        graph_module = export(unet, call)
        annotate_layout(graph_module, sparsity)
        return MacReport(count_graph(graph_module, call.tensors), height=height, width=width, batch=batch)
    # Check the edit first: building the graphs takes seconds.
    edit = _edit_mask(mask, edit_size, latent_size(height, width, scale_factor=scale_factor))
    return MacCounter.of_call(unet, call, sparsity, scale_factor).report(mask=edit)


def count_dense(lowered: Lowered, *, check: bool = True) -> MacCount:
    """MACs of one dense call; ``check`` compares them with fvcore's count, which takes seconds for a large U-Net."""
    return MacCounter(lowered, check=check).dense


def count_step(lowered: Lowered, plan: EditPlan, *, check: bool = True) -> MacCount:
    """MACs of one sparse step of an edit, without those that depend on the prompt alone (:func:`count_prompt`)."""
    return MacCounter(lowered, check=check).step(plan)


def count_prompt(lowered: Lowered, *, check: bool = True) -> MacCount:
    """MACs that an edit does once, for its new prompt: the keys and values of cross-attention."""
    return MacCounter(lowered, check=check).prompt


class MacCounter:
    """Counts the dense call of one U-Net, and its sparse steps for any number of masks.

    Args:
        lowered: the graphs of the U-Net, on any device.
        scale_factor: how many image pixels a latent pixel is wide.
        check: whether the first count of each graph is compared with fvcore's.
        costs: predicts microseconds, by which ``blocks="measured"`` chooses the rows.
    """

    def __init__(
        self,
        lowered: Lowered,
        *,
        scale_factor: int = VAE_SCALE_FACTOR,
        check: bool = True,
        costs: CostModel | None = None,
    ) -> None:
        self.lowered = lowered
        self.latents = height, width = lowered.latents
        self.image = (height * scale_factor, width * scale_factor)
        self._check, self._costs = check, costs
        self.shapes = lowered.step_specs
        self._stages = {name: GraphCounter(stage.graph_module, check=check) for name, stage in lowered.stages.items()}

    @classmethod
    def of(
        cls,
        unet_or_model: Any,
        *,
        height: int,
        width: int,
        batch: int = 2,
        attention: AttentionMode | None = None,
        config: SparsityConfig | dict[str, Any] | None = None,
    ) -> MacCounter:
        """A counter for a model; arguments and errors are those of :func:`count_macs`."""
        unet, scale_factor = _unet_of(unet_or_model)
        call = _call(unet, scale_factor, height=height, width=width, batch=batch)
        return cls.of_call(unet, call, _config(config, attention), scale_factor)

    @classmethod
    def of_call(
        cls, unet: UNet2DConditionModel, call: Call, config: SparsityConfig, scale_factor: int = VAE_SCALE_FACTOR
    ) -> MacCounter:
        """A counter for one call of a U-Net; with ``blocks="measured"`` the U-Net's layers are timed first."""
        lowered = lower(unet, call, config)
        costs = RowCosts.of(lowered) if lowered.config.blocks == "measured" else None
        return cls(lowered, scale_factor=scale_factor, costs=costs)

    @cached_property
    def dense(self) -> MacCount:
        """MACs of one call of the whole U-Net."""
        return count_graph(self.lowered.dense, [self.shapes[name] for name in self.lowered.inputs], check=self._check)

    @property
    def prompt(self) -> MacCount:
        """MACs that an edit does once, for its new prompt."""
        return self._once_an_edit[0]

    @cached_property
    def timestep(self) -> MacCount:
        """MACs that depend on the timestep alone, which a base does once at each step for all its edits."""
        names = {entry.node for entry in self.lowered.kept.cache_entries if entry.kind == "value"}
        graph_module = copy_graph(self.lowered.dense)
        graph = graph_module.graph
        graph.output_node().args = (tuple(node for node in graph.nodes if node.name in names),)
        prune(graph)
        inputs = [self.shapes[node.target] for node in graph.find_nodes(op="placeholder")]
        return count_graph(graph_module, inputs, check=self._check and bool(names))

    def step(self, plan: EditPlan) -> MacCount:
        """MACs of one sparse step: of reading the base's cache (stage ``fetch``) and of the step itself."""
        values = {**self.shapes, **self._once_an_edit[1]}
        values.update((request, plan.tensor(request)) for request in self.lowered.plan_requests)
        fetch = self._run("fetch", values)
        return fetch + self._run("step", values)

    def plan(self, mask: MaskLike) -> EditPlan:
        """The plan of a mask, see :meth:`report`."""
        return self.lowered.plan(latent_mask(mask, self.latents).cpu(), costs=self._costs)

    def report(self, *, mask: MaskLike | None = None, edit_size: float | None = None) -> MacReport:
        """MACs of the dense call and of an edit's sparse step, side by side.

        Args:
            mask: what :func:`~fisedit_compile.masks.sample_masks.latent_mask` takes; of n masks, sample b of the batch
                has mask ``b % n``.
            edit_size: the edit instead of a mask: a square in the middle with this share of the picture, in (0, 1], see
                :func:`~fisedit_compile.masks.sample_masks.square_mask`.

        Raises:
            ValueError: none or both of the two are given, or the edit size is outside (0, 1].
            MaskError: the mask has other proportions than the image, or n does not divide the batch.
        """
        plan = self.plan(_edit_mask(mask, edit_size, self.latents))
        height, width = self.image
        return MacReport(
            self.dense,
            height=height,
            width=width,
            batch=self.lowered.batch,
            sparse=self.step(plan),
            prompt=self.prompt,
            edit_size=float(plan.mask.double().mean()),
            attention=self.lowered.config.attention,
        )

    @cached_property
    def _once_an_edit(self) -> tuple[MacCount, dict[Any, Tensor]]:
        """The MACs of the stage ``prompt``, and the inputs of later stages that do not depend on the mask."""
        values = dict(self.shapes)
        self._run("constant", values)  # not counted: it rearranges weights, once for each model
        return self._run("prompt", values), values

    def _run(self, name: str, values: dict[Any, Tensor]) -> MacCount:
        """The MACs of a stage; adds to ``values`` what later stages read of its results."""
        stage = self.lowered.stages[name]
        count, out = self._stages[name].count([values[each] for each in stage.names])
        if stage.outputs:
            values.update(zip(stage.outputs, out, strict=True))
        return count


def _edit_mask(mask: MaskLike | None, edit_size: float | None, latents: tuple[int, int]) -> Tensor:
    if mask is not None and edit_size is None:
        return latent_mask(mask, latents)
    if mask is None and edit_size is not None:
        return square_mask(edit_size, latents)
    raise ValueError("give a mask or an edit_size, one of the two")


def _config(config: SparsityConfig | dict[str, Any] | None, attention: AttentionMode | None) -> SparsityConfig:
    sparsity = SparsityConfig.of(config)
    return sparsity if attention is None else replace(sparsity, attention=attention)


def _call(unet: UNet2DConditionModel, scale_factor: int, *, height: int, width: int, batch: int) -> Call:
    args, kwargs = unet_inputs(unet, batch=batch, height=height, width=width, scale_factor=scale_factor)
    return bind(unet, args, kwargs)


def _unet_of(model: Any) -> tuple[UNet2DConditionModel, int]:
    """The U-Net that a name, a pipeline or a U-Net stands for, and how many image pixels a latent pixel is wide."""
    if isinstance(model, str):
        return build_unet(model, device="meta"), VAE_SCALE_FACTOR
    if isinstance(model, UNet2DConditionModel):
        return model, VAE_SCALE_FACTOR
    unet = getattr(model, "unet", None)
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(
            f"{type(model).__name__} is no UNet2DConditionModel and has none as .unet: "
            "give a U-Net, a Stable Diffusion pipeline or the name of an architecture"
        )
    return unet, model.vae_scale_factor
