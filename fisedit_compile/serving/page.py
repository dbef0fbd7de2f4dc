"""The page: make a picture, paint where to change it or have that found, edit it in rounds, and see what was saved."""

from __future__ import annotations

import hmac
import os
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from PIL import Image

from fisedit_compile.serving.front import Front
from fisedit_compile.serving.picture_files import as_png, of_png
from fisedit_compile.serving.protocol.errors import api_error
from fisedit_compile.serving.protocol.limits import Defaults, Limits
from fisedit_compile.serving.requests import Answer, EditRequest, GenerationRequest, Request, Reuse, Settings

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
import gradio as gr

_FOUND, _PAINTED = "Find it by the words", "Where I paint"

_TITLE = "# Pictures, changed by words\nOnly what changes is computed again."

#: Pictures while one is drawn, and pictures of the strip.
_PARTIAL, _MOST_SHOWN = 2, 40

_CSS = """
.gradio-container {max-width: 1100px !important; margin: auto}
#strip .grid-container {grid-template-columns: repeat(8, 1fr) !important}
"""


def mount_page(app: FastAPI, front: Front, defaults: Defaults, limits: Limits, token: str | None) -> FastAPI:
    """The app with the page at ``/``.

    Args:
        app: of :func:`~fisedit_compile.serving.protocol.app.build_app`.
        front: answers.
        defaults, limits: of requests.
        token: that people have to give as their password; None lets everyone in.
    """
    fonts = ["system-ui", "sans-serif"]
    return gr.mount_gradio_app(
        app,
        build_page(front, defaults, limits),
        path="/",
        auth=None if token is None else lambda _, password: hmac.compare_digest(password.encode(), token.encode()),
        auth_message="The password is the token of this service; any name will do.",
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=limits.body_bytes,
        theme=gr.themes.Soft(font=fonts, font_mono=["monospace"]),  # none that is fetched from elsewhere
        css=_CSS,
    )


def build_page(front: Front, defaults: Defaults, limits: Limits) -> gr.Blocks:
    """The page's components, and what they do.

    Args:
        front, defaults, limits: see :func:`mount_page`.
    """
    work = _Work(front, defaults, limits)
    with gr.Blocks(title="fisedit-compile", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_TITLE)
        shown = gr.State([])  # names of pictures and what is written below each
        current = gr.State("")  # the picture that is edited next
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox(label="A picture of", elem_id="prompt", max_length=limits.letters)
                with gr.Accordion("More", open=False):
                    seed = gr.Number(label="Seed (empty: any)", value=None, precision=0, minimum=0, elem_id="seed")
                    steps = gr.Slider(2, limits.steps, defaults.steps, step=1, label="Steps")
                    guidance = gr.Slider(0, 20, defaults.guidance, step=0.5, label="Guidance")
                    anew = gr.Checkbox(label="Draw it anew, whatever is there")
                make = gr.Button("Make", variant="primary", elem_id="make")
                words = gr.Textbox(label="Becomes", elem_id="words", max_length=limits.letters)
                where = gr.Radio([_FOUND, _PAINTED], value=_FOUND, label="Where", elem_id="where")
                canvas = gr.ImageMask(
                    label="Paint here",
                    type="pil",
                    layers=False,
                    transforms=(),
                    sources=(),
                    brush=gr.Brush(default_size="auto", colors=["#ffffff"], color_mode="fixed"),
                    visible=False,
                    elem_id="canvas",
                )
                edit = gr.Button("Edit", variant="primary", elem_id="edit")
                stop = gr.Button("Stop", elem_id="stop")
            with gr.Column():
                picture = gr.Image(label="Picture", type="pil", interactive=False, elem_id="picture")
                slider = gr.ImageSlider(label="Before and after", type="pil", visible=False, elem_id="slider")
                said = gr.Markdown(elem_id="said")
        strip = gr.Gallery(label="So far; choose one to go on from it", columns=8, height=190, elem_id="strip")

        outputs = [picture, slider, said, canvas, words, current, shown, strip]
        making = make.click(work.make, [prompt, seed, steps, guidance, anew, shown], outputs)
        editing = edit.click(work.edit, [current, words, where, canvas, shown], outputs)
        stop.click(None, cancels=[making, editing])
        where.change(lambda chosen: gr.update(visible=chosen == _PAINTED), where, canvas, show_progress="hidden")
        strip.select(work.choose, shown, [picture, slider, said, canvas, words, current], show_progress="hidden")
    return page


class _Work:
    """What the page's buttons do."""

    def __init__(self, front: Front, defaults: Defaults, limits: Limits) -> None:
        self._front, self._defaults, self._limits = front, defaults, limits

    async def make(
        self, prompt: str, seed: int | None, steps: int, guidance: float, anew: bool, shown: list[Any]
    ) -> AsyncIterator[list[Any]]:
        """A picture of the prompt."""
        if not prompt.strip():
            raise gr.Error("Say what the picture is of.")
        side = self._defaults.side
        settings = Settings(side, side, int(min(steps, self._limits.steps)), float(guidance))
        request = GenerationRequest(prompt.strip(), settings, None if seed is None else int(seed))
        if anew:
            request = GenerationRequest(request.prompt, settings, request.seed, "never")
        async for update in self._draw(request, shown):
            yield update

    async def edit(
        self, current: str, words: str, where: str, canvas: dict[str, Any] | None, shown: list[Any]
    ) -> AsyncIterator[list[Any]]:
        """The chosen picture with other words."""
        if not current:
            raise gr.Error("Make a picture first, or choose one.")
        mask = None
        if where == _PAINTED:
            mask = _painted(canvas)
        async for update in self._draw(EditRequest(current, words.strip(), mask), shown):
            yield update

    async def choose(self, shown: list[Any], chosen: gr.SelectData) -> list[Any]:
        """A picture of the strip is the one that is edited next."""
        name, said = shown[int(chosen.index)]
        record = await self._picture(name)
        image = of_png(record.png)
        hidden = gr.update(visible=False)
        return [gr.update(value=image, visible=True), hidden, said, _on_canvas(image), record.prompt, name]

    async def _draw(self, request: Request, shown: list[Any]) -> AsyncIterator[list[Any]]:
        same = gr.skip()
        try:
            events = self._front.answer(request, progress=True, partial_pictures=_PARTIAL)
            async for event in events:
                if not isinstance(event, Answer):
                    seen = same if event.png is None else gr.update(value=of_png(event.png), visible=True)
                    hidden = same if event.png is None else gr.update(visible=False)
                    yield [seen, hidden, f"Step {event.step} of {event.steps} …", *[same] * 5]
                    continue
                image = of_png(event.png)
                said = _said(event)
                pictures = [*shown, (event.id, said)][-_MOST_SHOWN:]
                before = None
                if event.reuse.kind == "edit" and event.reuse.base:
                    before = of_png((await self._picture(event.reuse.base)).png)
                yield [
                    gr.update(value=image, visible=before is None),
                    gr.update(value=(before, image) if before else None, visible=before is not None),
                    said,
                    _on_canvas(image),
                    event.prompt,
                    event.id,
                    pictures,
                    [(of_png((await self._picture(name)).png), None) for name, _ in pictures],
                ]
        except Exception as error:
            raise gr.Error(api_error(error).content["error"]["message"]) from None

    async def _picture(self, name: str) -> Any:
        try:
            return await self._front.picture(name)
        except Exception as error:
            raise gr.Error(api_error(error).content["error"]["message"]) from None


def _on_canvas(image: Image.Image) -> dict[str, Any]:
    return {"background": image, "layers": [], "composite": None}


def _painted(canvas: dict[str, Any] | None) -> bytes:
    layers = (canvas or {}).get("layers") or []
    if not layers or not layers[0].getchannel("A").getbbox():
        raise gr.Error("Paint over what is to change, or have it found by the words.")
    return as_png(layers[0].getchannel("A").point(lambda alpha: 255 if alpha else 0))


def _said(answer: Answer) -> str:
    """What was saved, in a sentence, and a link to the file."""
    return f"{_how(answer.reuse, answer)} [Download](v1/pictures/{answer.id})"


def _how(reuse: Reuse, answer: Answer) -> str:
    saved = reuse.seconds_saved
    usual = f" instead of {answer.seconds + saved:.1f} s" if saved is not None else ""
    if reuse.kind == "stored":
        return f"This picture was there: nothing was computed{usual and f', which would have taken {saved:.1f} s'}."
    if reuse.kind == "none":
        return f"Drawn in {answer.seconds:.1f} s." + (f" Nothing was reused: {reuse.why}." if reuse.why else "")
    ratio = answer.report.get("macs_ratio")
    macs = f", at 1/{ratio:.1f} of the multiply-accumulates a step" if ratio and ratio > 1 else ""
    return f"{reuse.mask_area or 0:.0%} of the picture was computed{macs}, in {answer.seconds:.1f} s{usual}."
