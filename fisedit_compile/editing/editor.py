"""The editor: generate a picture, keep its base, edit it by new words (FISEdit, figure 2).

The pipeline runs its own loop, in a copy whose U-Net's calls are recorded or edited, and a step-end callback forces the
latents outside the mask to the base's.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, overload
from weakref import WeakKeyDictionary, WeakSet

import torch

from fisedit_compile.cache.read_base import open_base
from fisedit_compile.cache.write_base import base_writer
from fisedit_compile.config import SparsityConfig
from fisedit_compile.editing.arguments import (
    call_parameters,
    check_arguments,
    check_generators,
    check_prompts,
    one_for_each,
    owned,
    without_return_dict,
)
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.batch_arguments import check_together
from fisedit_compile.editing.decoding import Decoders
from fisedit_compile.editing.disk_record import DiskRecord
from fisedit_compile.editing.edit_checks import Background, Combine, Output
from fisedit_compile.editing.edit_maker import EditMaker
from fisedit_compile.editing.edit_request import CheckedEdit, EditRequest
from fisedit_compile.editing.edit_run import EditRun
from fisedit_compile.editing.embeddings import check_embeddings
from fisedit_compile.editing.failures import Failures
from fisedit_compile.editing.inversion import InvertRun, check_inversion
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.photo import encode, read_photos
from fisedit_compile.editing.photo_frame import Box, PhotoFrame
from fisedit_compile.editing.pipeline_call import in_turn
from fisedit_compile.editing.pipeline_digest import pipeline_digest
from fisedit_compile.editing.pipeline_state import PipelineState, PipelineWatch
from fisedit_compile.editing.record_run import RecordRun
from fisedit_compile.editing.result import Edit
from fisedit_compile.editing.rounds import RebaseRun, Trajectory
from fisedit_compile.editing.saved_base import SavedBase
from fisedit_compile.editing.schedule import Schedule, refuse_unseeded
from fisedit_compile.editing.step_callback import StepCallback
from fisedit_compile.editing.step_ends import WITHOUT_CALLBACK
from fisedit_compile.editing.text_memo import TextMemo
from fisedit_compile.editing.word_weights import Weights
from fisedit_compile.errors import CaptureError, FiseditError
from fisedit_compile.masks.user_mask import MaskLike
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.sparse_unet import SparseUNet, sparsify


class Editor:
    """Edits pictures that it generated itself, with any pipeline of the StableDiffusionPipeline family.

    The pipeline is used as it is at each call, so its models and scheduler may be exchanged in between. It is never
    changed: what it says of its last call (``pipe.num_timesteps``) is of a call of its own. Threads that share an
    editor take turns. ``pipe._interrupt = True``, from a callback or another thread, stops a generation or an edit.

    Args:
        pipe: a diffusers pipeline whose U-Net is a ``UNet2DConditionModel`` and whose call takes
            ``callback_on_step_end``.
        config: a :class:`SparsityConfig`, a dict of its fields, or None.

    Raises:
        CaptureError: a pipeline without such a U-Net or callback.
        ValueError: an unknown config field or value.
    """

    def __init__(self, pipe: Any, config: SparsityConfig | dict[str, Any] | None = None) -> None:
        if not hasattr(pipe, "unet") or not callable(pipe):
            raise CaptureError(f"Editor takes a diffusers pipeline with a U-Net, not a {type(pipe).__name__}")
        needed = {"prompt", "num_inference_steps"}
        if type(pipe).__name__ not in WITHOUT_CALLBACK:
            needed.add("callback_on_step_end")
        if missing := needed - set(call_parameters(pipe)):
            raise CaptureError(
                f"{type(pipe).__name__} takes no {', '.join(sorted(missing))}: use a StableDiffusionPipeline or a "
                "pipeline of its family"
            )
        self.pipe = pipe
        self.config = SparsityConfig.of(config)
        if config is None and isinstance(pipe.unet, SparseUNet):
            self.config = pipe.unet.sparsity
        self._turn = threading.RLock()
        self._watch, self._tokenizers, self._decoders = PipelineWatch(), OwnTokenizers(), Decoders()
        self._texts = TextMemo(self._watch.of)
        self._maker = EditMaker(self._watch, self._decoders, self._texts)
        self._bases_of_edits: WeakKeyDictionary[Edit, Base] = WeakKeyDictionary()
        self._loaded: WeakSet[Base] = WeakSet()
        self._unet: SparseUNet | None = None
        self._unet = self.unet

    @property
    def unet(self) -> SparseUNet:
        """The pipeline's U-Net as it is now, mask-aware.

        Raises:
            CaptureError: no U-Net that can be made so.
            ValueError: one that was sparsified with another config.
        """
        unet = self.pipe.unet
        if not isinstance(unet, SparseUNet):
            known = self._unet is not None and self._unet.unet is unet
            return self._unet if known else sparsify(unet, self.config)  # type: ignore[return-value]
        if unet.sparsity != self.config:
            raise ValueError("pipe.unet was sparsified with another config: give that one, or none")
        return unet

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.pipe, self.config)  # copies and pickles; graphs are captured anew

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        folder: str | Path | None = None,
        **arguments: Any,
    ) -> Base:
        """Generate with the pipeline, and keep what edits of the result need.

        Args:
            prompt: a prompt, or one a sample.
            num_inference_steps, guidance_scale: as the pipeline takes them.
            generator: random generator(s); None draws a seed from torch's default one.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as the pipeline takes them. The pipeline that the
                callback is given is this call's own. Edits do not run it: one that changes the loop has to be given to
                them, too.
            folder: where the base is saved while it is recorded, so that what its U-Net calls keep never lies in memory
                as a whole. What is returned is what :meth:`load` gives of it with ``tier="disk"``.
            arguments: anything else the pipeline's call takes: ``height``, ``width``, ``negative_prompt``,
                ``num_images_per_prompt``, ``latents``, ... Tensors and pictures are copied. With ``prompt_embeds`` (and
                ``pooled_prompt_embeds``) these are drawn, and the prompt is the words at whose places their tokens are
                (:mod:`fisedit_compile.editing.embeddings`).

        Returns:
            The base; it is never changed afterwards.

        Raises:
            ValueError: an argument that the pipeline does not take, of a wrong type or value, or that an editor cannot
                do with: no prompt, another kind of output, perturbed-attention guidance, a scheduler with noise of its
                own.
            BaseMemoryError: the base would take more memory than is free.
            PipelineInterruptedError: ``pipe._interrupt`` was set before the last step had ended.
            CaptureError: the U-Net is not one graph, or the pipeline's loop not one of ``num_inference_steps``.
            SavedBaseError: something lies in the ``folder`` already, or it cannot be written (``BaseStorageError``);
                nothing is left there.
        """
        prompts, generators = check_prompts(prompt), check_generators(generator)
        kept = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        kept.update(without_return_dict(arguments))
        check_arguments(self.pipe, kept)
        refuse_unseeded(self.pipe.scheduler)
        check_embeddings(self.pipe, prompts, kept, controlled=self._controls)
        callback = self._callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        kept = owned(one_for_each(prompts, kept))

        def record(disk: DiskRecord | None) -> Base:
            with self._in_turn() as (unet, unet_state):
                run = RecordRun(unet, self.pipe, self._tokenizers, callback, self.config, kept, disk=disk)
                state = self._watch.look(run.pipe, unet_state, prompts)
                self._texts.serve(run.pipe, state.models, kept)
                run.decoding = self._decoders.recording(self.pipe, state)
                return run.record(prompts, generators, state)

        return self._recorded(record, folder)

    def invert(
        self,
        photo: Any,
        prompt: str | Sequence[str] = "",
        *,
        box: Box | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        folder: str | Path | None = None,
        **arguments: Any,
    ) -> Base:
        """Make a base of a picture that the model did not draw, a photo for example, to edit it like any other.

        The pipeline is run backwards without guidance (:mod:`fisedit_compile.editing.inversion`) through the steps that
        edits visit, which takes three U-Net calls each (two where that is all of them), and then recorded along the
        latents that were found. Outside the mask of an edit they are the picture's, and the pixels its own.

        Args:
            photo: a PIL image, or a list of them, one a prompt, of any size; see
                :func:`~fisedit_compile.editing.photo.read_photos` for what is taken. Edits are as large as it.
            prompt: what the picture shows, or one a picture. Words that it does not show cannot be edited; with none,
                an edit needs a mask, and fills it by its own words.
            box: left, upper, right and lower edge of the part that the model is shown, in pixels, where the picture is
                larger than it can do with: edits change that part alone.
            num_inference_steps, guidance_scale: of the edits.
            folder: see :meth:`generate`.
            arguments: anything else the pipeline's call takes, but for what the picture decides: its size, latents,
                generators, how many pictures. ControlNet's ``image`` is one.

        Returns:
            The base. Its ``images`` are the pictures, upright and in RGB.

        Raises:
            ValueError: a picture that is not taken; an argument that the pipeline or an inversion does not take; a
                pipeline that starts from pictures itself; a scheduler that cannot be run backwards.
            BaseMemoryError, PipelineInterruptedError, CaptureError, SavedBaseError: see :meth:`generate`.
        """
        prompts, photos = check_prompts(prompt), read_photos(photo)
        kept = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        kept.update(without_return_dict(arguments))
        check_arguments(self.pipe, kept)
        check_embeddings(self.pipe, prompts, kept, controlled=self._controls)
        check_inversion(self.pipe, kept, prompts, photos)
        frame = PhotoFrame.of(self.pipe, photos, box)
        width, height = frame.size
        kept = owned(one_for_each(prompts, {**kept, "height": height, "width": width}))
        generators = check_generators(torch.Generator().manual_seed(0))  # nothing is drawn

        def record(disk: DiskRecord | None) -> Base:
            with self._in_turn() as (unet, unet_state):
                latents = encode(self.pipe, frame.pictures(), unet.dtype)
                backwards = InvertRun(unet, self.pipe, self._tokenizers, latents, self.config.stride, kept)
                plain = {**kept, "latents": latents, "guidance_scale": 1.0, "output_type": "latent"}
                backwards.draw(prompts, generators, plain)
                state = self._watch.look(backwards.pipe, unet_state, prompts)
                made = backwards.trajectory(prompts, kept, generators, state, self.config, frame)
                return self._rebased(unet, made, state, photos, disk=disk)

        return self._recorded(record, folder)

    def edit(
        self,
        base: Base | Edit,
        prompt: str | Sequence[str],
        mask: MaskLike | None = None,
        *,
        weights: Weights | Sequence[Weights | None] | None = None,
        combine: Combine = "replace",
        largest_mask: float = 1.0,
        background: Background = "pixels",
        output_type: Output | None = None,
        dense: bool = False,
        cross_replace: float | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        **arguments: Any,
    ) -> Edit:
        """Change the words of a base's prompt, and with them the part of the picture they describe.

        Args:
            base: from :meth:`generate` of an editor with this pipeline and config; or an edit, to change its picture
                further (:meth:`base_of`). Read only.
            prompt: the new prompt, or one a sample of the base. Samples whose prompts stay are the base's, bit for bit.
            mask: where to edit, instead of finding out: an image, array or tensor of any size, soft in [0, 1] or hard,
                one for all samples or one each. Of a photo it is drawn on all of it, but for a tensor or array of the
                latents' size, such as the ``mask`` of another edit.
            weights: how much words of the new prompt count, ``{"fluffy": 1.8}`` for example, or such a mapping for each
                sample: what the attention maps of the word (or words in a row) are multiplied by in steps under
                Prompt-to-Prompt control, as a rule in [-2, 2] (:mod:`fisedit_compile.editing.word_weights`). The
                prompt may be the base's own.
            combine: with a mask given: ``"replace"`` uses it alone, ``"and"`` / ``"or"`` cut or join it with the one
                that is found.
            largest_mask: share of the picture, in (0, 1], that a mask which is found may cover: the edit ends with a
                ``LargeMaskError`` behind its dense steps where it covers more. A mask that is given alone is not
                looked at.
            background: ``"pixels"``: away from the mask the picture is the base's, bit for bit
                (:class:`~fisedit_compile.editing.background.PixelBackground`); ``"latents"``: the picture as the
                pipeline decodes it, whose latents outside the mask are the base's.
            output_type: ``"latent"`` decodes nothing, and ``images`` are the latents; another kind of pictures than the
                base's needs ``background="latents"``. None is the base's.
            dense: run all steps through the dense U-Net, to see what a sparse edit should look like
                (:class:`~fisedit_compile.editing.dense_edit.DenseEdit`). No mask is looked for: without one given the
                whole picture is free.
            cross_replace: share of the steps, in [0, 1], counted from the first, that take the base's attention maps of
                unchanged words: much of it keeps shapes and places, none draws the new words as a new picture would.
                None is the config's, of which the base keeps maps, so that more cannot be asked for.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as the pipeline takes them; it sees the latents
                before the background is restored.
            arguments: ``guidance_scale``, ``negative_prompt``, for SDXL ``prompt_2`` and ``negative_prompt_2``, and
                embeddings (see :meth:`generate`), where they are others than the base's. An edit repeats all other
                arguments of its base, and says so where one is given. With any of these the prompt may be the base's
                own.

        Raises:
            BaseMismatchError: a base of another model, tokenizer, scheduler, config or callback, or one that keeps
                fewer attention maps than ``cross_replace`` asks for.
            MaskError: a mask of no pixels, not finite, or for another number of samples; or none can be found; or the
                words of a sample change nothing that its text encoder sees.
            LargeMaskError: the mask that was found covers more than ``largest_mask``; a ``MaskError``.
            PipelineInterruptedError: ``pipe._interrupt`` was set before the last step had ended.
            ValueError: prompts that are the base's own though nothing else changes, or another number of prompts than
                the base has; other words with the base's embeddings; an argument that an edit does not take; words in
                ``weights`` that the prompt has not; or pictures whose background cannot be the base's in pixels.
        """
        request = EditRequest(
            base,
            prompt,
            mask,
            weights=weights,
            combine=combine,
            largest_mask=largest_mask,
            cross_replace=cross_replace,
            **arguments,
        )
        [edit] = self._make(
            [request],
            Failures(1, kept=False),
            background=background,
            output_type=output_type,
            callback=self._callback(callback_on_step_end, callback_on_step_end_tensor_inputs),
            dense=dense,
        )
        assert isinstance(edit, Edit)
        return edit

    @overload
    def edit_many(
        self,
        requests: Sequence[EditRequest],
        *,
        background: Background = ...,
        output_type: Output | None = ...,
        return_exceptions: Literal[False] = ...,
    ) -> list[Edit]: ...

    @overload
    def edit_many(
        self,
        requests: Sequence[EditRequest],
        *,
        background: Background = ...,
        output_type: Output | None = ...,
        return_exceptions: Literal[True],
    ) -> list[Edit | Exception]: ...

    def edit_many(
        self,
        requests: Sequence[EditRequest],
        *,
        background: Background = "pixels",
        output_type: Output | None = None,
        return_exceptions: bool = False,
    ) -> Sequence[Edit | Exception]:
        """Make several edits in one run of the pipeline, each as :meth:`edit` makes it alone, up to rounding.

        Their bases may be different ones or the same, with any words, masks and numbers of pictures; one mask may be
        given and another found. What a pipeline takes one of they have in common: size, steps, scheduler, guidance
        scale, and all other arguments that they were generated with.

        Args:
            requests: the edits.
            background, output_type: of all of them, see :meth:`edit`.
            return_exceptions: return the error of an edit that cannot be made in its place, and make the others. Errors
                that are not of one edit alone are raised all the same.

        Returns:
            An :class:`Edit` for each request, in their order; with ``return_exceptions`` some may be exceptions.

        Raises:
            ValueError: no requests; a difference that keeps two edits from being made together, by the places of both
                (from 0); a base that was recorded with a callback that changed its loop, or by a pipeline that starts
                from pictures.
            BaseMismatchError, MaskError, ValueError: see :meth:`edit`; the message names the edit's place.
            BaseMemoryError, PipelineInterruptedError: see :meth:`edit`; nothing is kept of any edit.
        """
        if not requests or not all(isinstance(each, EditRequest) for each in requests):
            raise ValueError("edit_many takes a list of EditRequest(base, prompt, ...), at least one")
        return self._make(
            requests,
            Failures(len(requests), kept=return_exceptions),
            background=background,
            output_type=output_type,
        )

    def _make(
        self,
        requests: Sequence[EditRequest],
        failures: Failures,
        *,
        background: Background,
        output_type: Output | None,
        callback: StepCallback | None = None,
        dense: bool = False,
    ) -> list[Edit | Exception]:
        """The edits of one run, or the error of each that failed."""
        checked: list[CheckedEdit] = []
        for index, request in enumerate(requests):
            with failures.of(index):
                base = self.base_of(request.base) if isinstance(request.base, Edit) else request.base
                checked.append(
                    CheckedEdit.of(
                        self.pipe,
                        request,
                        base,
                        index,
                        background=background,
                        output_type=output_type,
                        has_callback=(request.callback or callback) is not None,
                        dense=dense,
                    )
                )
        if not checked:
            return [failures.errors[index] for index in range(len(requests))]
        check_together(self.pipe, checked)
        with self._in_turn() as (unet, unet_state):
            made = self._maker.make(
                self.pipe,
                EditRun(unet, self.pipe, self._tokenizers, callback, failures),
                unet_state,
                checked,
                failures,
                composed=background == "pixels" and output_type != "latent",
                output={} if output_type is None else {"output_type": output_type},
            )
        return [failures.errors.get(index) or made[index] for index in range(len(requests))]

    def base_of(self, edit: Edit) -> Base:
        """A base of an edit's picture, which :meth:`edit` makes where it is given an edit: a second round, and further.

        The picture is recorded along the latents that the edit went through (:mod:`fisedit_compile.editing.rounds`),
        by one dense U-Net call for each step that edits visit. The base is kept as long as the edit is, and needs
        nothing of the base that the edit was made from.

        Raises:
            BaseMismatchError: another model, tokenizer, scheduler or config than the edit was made with, or a callback
                that changed its loop.
            ValueError: an edit without pictures (``output_type="latent"``).
            BaseMemoryError, PipelineInterruptedError: see :meth:`generate`.
        """
        with self._turn:
            known = self._bases_of_edits.get(edit)
            if known is None:
                known = self._bases_of_edits[edit] = self._base_of(edit)
        return known

    def _base_of(self, edit: Edit) -> Base:
        made = edit.trajectory
        if edit.report.decoder == "none":
            raise ValueError("the edit has latents in the place of pictures: edit with another output_type")
        if made.frame is not None and not isinstance(edit.images, list):
            raise ValueError("an edit of a part of a photo is edited again as PIL images: leave output_type out")
        with self._in_turn() as (unet, unet_state):
            state = self._watch.look(self._tokenizers.within(self.pipe), unet_state, made.prompts)
            made.check(state, Schedule.of(self.pipe.scheduler), self.config)
            return self._rebased(unet, made, state, owned(edit.images), nsfw=edit.nsfw)

    def _rebased(
        self,
        unet: SparseUNet,
        made: Trajectory,
        state: PipelineState,
        images: Any,
        *,
        nsfw: tuple[bool, ...] | None = None,
        disk: DiskRecord | None = None,
    ) -> Base:
        """The base of pictures whose latents are known at the steps that edits visit."""
        run = RebaseRun(unet, self.pipe, self._tokenizers, made, disk)
        self._texts.serve(run.pipe, state.models, made.arguments)
        run.decoding = self._decoders.recording(self.pipe, state)
        return run.rebase(state, images, nsfw)

    def _recorded(self, record: Callable[[DiskRecord | None], Base], folder: str | Path | None) -> Base:
        """The base that ``record`` makes; where a folder is given as one that is saved there, and stays there."""
        if folder is None:
            return record(None)
        with base_writer(Path(folder)) as writer:
            writer.finish(record(DiskRecord(writer)).pack())
        return self.load(folder, tier="disk")

    def load(self, folder: str | Path, *, tier: Literal["disk"] | None = None) -> Base:
        """Read a base that :meth:`Base.save` wrote. Its edits are those of the base that was saved.

        Its tensors come to the device on which they were made, or to the pipeline's where that one is not here. What
        its U-Net calls keep is read behind the return, in the order of the steps: each step of an edit waits for its
        own call, and raises what cannot be read of it (:meth:`Base.wait` waits for all). Nobody can remove the folder
        until then.

        Args:
            folder: of the base.
            tier: ``"disk"`` leaves what the calls keep where it is. Each edit reads it anew, some calls ahead of its
                steps, and has the memory of four calls at a time; the folder cannot be removed while somebody holds
                the base. None reads it once, into memory.

        Raises:
            ValueError: another ``tier``.
            BaseMismatchError: a base of another model, tokenizer, scheduler or config, or one that other versions of
                this package, torch or diffusers wrote.
            BaseFormatError: no saved base, or one of another format.
            DamagedBaseError: files that are not what was written, as far as they were read.
            BaseMemoryError: the base would take more memory than is free.
        """
        if tier not in (None, "disk"):
            raise ValueError(f"tier={tier!r}: 'disk' leaves a base there, None reads it into memory")
        with open_base(Path(folder)) as opened:
            saved = SavedBase(opened, self.pipe.device)
            begun = saved.begin(stays=tier == "disk")
            try:
                with self._in_turn() as (_, unet_state):
                    pipe = self._tokenizers.within(self.pipe)
                    state = self._watch.look(pipe, unet_state, saved.base.prompts)
                    saved.base.check(state, Schedule.of(pipe.scheduler), self.config)
                    state.read_weights()
            except BaseException:
                begun.reading.stop()
                raise
            opened.note_use()
            base = saved.whole(begun, state)
        self._loaded.add(base)
        return base

    def digest(self) -> str:
        """A hexadecimal key of all that decides a picture beside the arguments of a call, the same in every process.

        That is the models with every weight, which are read for it once, the tokenizers' words, the scheduler, the
        config, the kind of device, and the versions of this package, torch and diffusers.
        """
        with self._in_turn() as (_, unet_state):
            state = self._watch.look(self._tokenizers.within(self.pipe), unet_state, [""])
            return pipeline_digest(self.pipe, state, Schedule.of(self.pipe.scheduler), self.config)

    def free(self) -> None:
        """Let go of all graphs and of their memory on the device.

        Bases stay as they are; one that is being read is waited for, so that its folder is let go of. The next call
        makes graphs anew, of what was exported before.
        """
        for base in list(self._loaded):
            with contextlib.suppress(FiseditError):  # its next edit says so
                base.wait()
        with self._turn:
            if self._unet is not None:
                self._unet.free()
            self._texts = TextMemo(self._watch.of)
            self._maker = EditMaker(self._watch, self._decoders, self._texts)
            self._bases_of_edits.clear()
            gc.collect()  # graphs refer to each other in circles
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    @property
    def _controls(self) -> bool:
        """Whether bases keep attention maps for Prompt-to-Prompt control."""
        return bool(self.config.cross_replace)

    @contextmanager
    def _in_turn(self) -> Iterator[tuple[SparseUNet, ModelState]]:
        """One generation or edit after the other: the U-Net, and its state, which is looked at once for all steps."""
        with self._turn, in_turn(self.pipe):
            unet = self._unet = self.unet
            with unet.looked_at() as state:
                yield unet, state

    def _callback(self, callback: Any, tensor_inputs: Any) -> StepCallback | None:
        return None if callback is None else StepCallback(callback, tensor_inputs, self.pipe)
