"""The HTTP interface, as OpenAI's own client speaks it, and as somebody speaks it who means harm."""

from __future__ import annotations

import base64
import io
import json
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.http_server import served
from support.pipelines import left_half
from support.services import CAT, DOG, Service, service

from fisedit_compile import Editor
from fisedit_compile.serving.picture_files import as_png, of_png
from fisedit_compile.serving.protocol.app import build_app
from fisedit_compile.serving.protocol.limits import Defaults, Limits

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULTS = Defaults(side=32, multiple=8, steps=4, guidance=5.0)
LIMITS = Limits(pixels=64 * 64, steps=500, pictures=3, letters=100, body_bytes=2**18)


class Running:
    """A service, its URL, and OpenAI's client of it."""

    def __init__(self, parts: Service, url: str, token: str = "any") -> None:
        self.parts, self.url = parts, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)

    def generate(self, prompt: str = CAT, *, seed: int | None = 3, **changes: Any) -> Any:
        extra = {"seed": seed, **changes.pop("extra", {})}
        return self.client.images.generate(prompt=prompt, extra_body=extra, **changes)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=30, **arguments)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_editor: Editor) -> Iterator[Running]:
    """Any two prompts are similar to it."""
    with (
        service(tmp_path_factory.mktemp("service"), tiny_editor, similar=-1.0) as parts,
        served(build_app(parts.front, DEFAULTS, LIMITS)) as url,
    ):
        yield Running(parts, url)


def picture(image: Any) -> Image.Image:
    return of_png(base64.b64decode(image.b64_json))


def transparent_left() -> bytes:
    """A mask of OpenAI's kind."""
    alpha = Image.new("L", (32, 32), 255)
    alpha.paste(0, (0, 0, 16, 32))
    mask = Image.new("RGBA", (32, 32), "black")
    mask.putalpha(alpha)
    return as_png(mask)


class TestGenerations:
    def test_a_picture_and_the_same_again(self, running: Running) -> None:
        first, again = running.generate(), running.generate()
        assert (first.size, first.output_format) == ("32x32", "png")
        assert picture(first.data[0]).size == (32, 32)
        assert (first.data[0].seed, first.data[0].steps, first.data[0].reuse["kind"]) == (3, 4, "none")
        assert again.data[0].b64_json == first.data[0].b64_json
        assert (again.data[0].id, again.data[0].reuse["kind"]) == (first.data[0].id, "stored")

    def test_a_similar_one_is_an_edit_and_says_so(self, running: Running) -> None:
        base = running.generate(seed=11).data[0]
        edit = running.generate(DOG, seed=11).data[0]
        assert edit.reuse["kind"] == "edit"
        assert edit.reuse["base"] == base.id
        assert 0 < edit.reuse["mask_area"] < 1
        assert edit.reuse["seconds_saved"] is not None
        assert edit.report["added_words"] == ["dog"]
        assert running.generate(DOG, seed=11, extra={"reuse": "never"}).data[0].reuse["kind"] == "none"

    def test_by_url_and_gone_when_it_is_removed(self, running: Running) -> None:
        image = running.generate(seed=12, response_format="url").data[0]
        assert image.b64_json is None
        assert image.url == f"{running.url}/v1/pictures/{image.id}"
        got = httpx.get(image.url)
        assert got.headers["content-type"] == "image/png"
        assert of_png(got.content).size == (32, 32)
        assert httpx.delete(image.url).json() == {"id": image.id, "object": "picture", "deleted": True}
        for method in ("GET", "DELETE"):
            gone = httpx.request(method, image.url)
            assert (gone.status_code, gone.json()["error"]["code"]) == (404, "picture_not_found")

    def test_several(self, running: Running) -> None:
        fixed = running.generate(seed=20, n=3)
        assert [image.seed for image in fixed.data] == [20, 21, 22]
        free = running.generate(seed=None, n=3)
        assert len({image.b64_json for image in free.data}) == 3

    def test_what_clients_send_without_effect(self, running: Running) -> None:
        plain = running.generate(seed=3)
        more = running.generate(
            seed=3, model="gpt-image-2", quality="high", moderation="low", user="me", background="opaque", size="32x32"
        )
        assert more.data[0].id == plain.data[0].id

    def test_a_stream(self, running: Running) -> None:
        events = list(running.generate(seed=30, stream=True, partial_images=2))
        kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
        assert [event.type for event in events] == kinds
        assert [event.partial_image_index for event in events[:2]] == [0, 1]
        assert all(picture(event).size == (32, 32) for event in events)
        assert events[-1].b64_json == running.generate(seed=30).data[0].b64_json
        assert [event.type for event in running.generate(seed=30, stream=True)] == kinds[2:]

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"n": 4}, "n"),
            ({"n": 0}, "n"),
            ({"size": "96x96"}, "size"),
            ({"size": "33x32"}, "size"),
            ({"size": "0x0"}, "size"),
            ({"size": "large"}, "size"),
            ({"size": "999999999999x8"}, "size"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": 101 * "x"}, "prompt"),
            ({"extra": {"negative_prompt": 101 * "x"}}, "negative_prompt"),
            ({"extra": {"steps": 501}}, "steps"),
            ({"extra": {"steps": 0}}, "steps"),
            ({"extra": {"guidance": -1}}, "guidance"),
            ({"extra": {"seed": -1}}, "seed"),
            ({"extra": {"seed": 2**63}}, "seed"),
            ({"extra": {"seeds": 1}}, "seeds"),
            ({"extra": {"reuse": "perhaps"}}, "reuse"),
            ({"background": "transparent"}, "background"),
            ({"output_format": "webp"}, "output_format"),
            ({"stream": True, "n": 2}, "n"),
            ({"stream": True, "partial_images": 4}, "partial_images"),
        ],
        ids=str,
    )
    def test_refused(self, running: Running, changes: dict[str, Any], param: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            running.generate(**{"prompt": CAT, **changes})
        error = caught.value
        assert (error.param, error.type) == (param, "invalid_request_error")
        assert error.code in ("invalid_value", "too_much", "unknown_parameter")
        assert error.body["message"].startswith((f"{param}: ", "a stream"))

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"prompt": NaN}', b"\xff", b"[" * 5000])
    def test_no_json(self, running: Running, body: bytes) -> None:
        answer = running.post("/v1/images/generations", content=body, headers={"content-type": "application/json"})
        assert answer.status_code in (400, 422)
        assert answer.status_code == 400
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    def test_other_paths_and_methods(self, running: Running) -> None:
        for method, path, status in (
            ("POST", "/v1/images/variations", 404),
            ("GET", "/v1/pictures/..%2F..%2Fetc%2Fpasswd", 404),
            ("GET", "/v1/pictures/.lock", 404),
            ("GET", "/v1/pictures/p" + 22 * "x", 404),
            ("DELETE", "/v1/pictures/bases", 404),
            ("GET", "/v1/images/generations", 404),
        ):
            answer = httpx.request(method, running.url + path)
            assert answer.status_code == status, path
            assert answer.json()["error"]["type"] == "invalid_request_error"


class TestEdits:
    def test_by_name_within_a_mask(self, running: Running, tiny_editor: Editor) -> None:
        base = running.generate(seed=3).data[0]
        edit = running.client.images.edit(
            image=as_png(picture(base)), mask=transparent_left(), prompt=DOG, extra_body={"base": base.id}
        ).data[0]
        assert (edit.reuse["base"], edit.reuse["mask_area"], edit.report["mask_source"]) == (base.id, 0.5, "given")
        before, after = picture(base), picture(edit)
        assert before.crop((24, 0, 32, 32)).tobytes() == after.crop((24, 0, 32, 32)).tobytes()
        assert before.tobytes() != after.tobytes()

    def test_a_file_that_the_service_drew_is_its_picture(self, running: Running) -> None:
        base = running.generate(seed=3).data[0]
        named = running.post("/v1/images/edits", data={"base": base.id, "prompt": DOG, "size": "32x32"}).json()
        sent = running.client.images.edit(image=as_png(picture(base)), prompt=DOG).data[0]
        assert sent.reuse["base"] == base.id
        assert sent.b64_json == named["data"][0]["b64_json"]
        again = running.client.images.edit(image=[as_png(picture(sent))], prompt="a dog on the apple").data[0]
        assert again.reuse["base"] == sent.id

    def test_a_photo(self, running: Running) -> None:
        photo = Image.effect_noise((32, 32), 60).convert("RGB")
        file = io.BytesIO()
        photo.save(file, "WEBP", lossless=True)
        mask = as_png(Image.fromarray(left_half().numpy()))
        for _ in range(2):
            edit = running.client.images.edit(
                image=("photo.webp", file.getvalue()), mask=mask, prompt=DOG, extra_body={"steps": 4}
            ).data[0]
            assert edit.reuse["mask_area"] == 0.5
            assert picture(edit).crop((24, 0, 32, 32)).tobytes() == photo.crop((24, 0, 32, 32)).tobytes()
        with pytest.raises(openai.BadRequestError, match="mask"):
            running.client.images.edit(image=file.getvalue(), prompt=DOG)

    def test_a_stream(self, running: Running) -> None:
        base = running.generate(seed=3).data[0]
        events = list(
            running.client.images.edit(
                image=as_png(picture(base)), mask=transparent_left(), prompt=DOG, stream=True, partial_images=1
            )
        )
        assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
        assert events[-1].reuse["base"] == base.id
        assert events[-1].report["macs_ratio"] > 1

    @pytest.mark.parametrize(
        ("fields", "files", "param"),
        [
            ({"prompt": DOG}, {}, "image"),
            ({"base": "p" + 22 * "x"}, {}, "prompt"),
            ({"prompt": DOG, "base": "../bases"}, {}, "base"),
            ({"prompt": DOG, "base": "BASE", "size": "64x64"}, {}, "size"),
            ({"prompt": DOG, "base": "BASE", "n": "2"}, {}, "n"),
            ({"prompt": DOG, "base": "BASE", "seed": "2"}, {}, "seed"),
            ({"prompt": DOG, "base": "BASE"}, {"image": as_png(Image.new("RGB", (32, 32), "red"))}, "base"),
            ({"prompt": DOG, "base": "BASE", "image": "no file"}, {}, "image"),
        ],
        ids=str,
    )
    def test_refused(self, running: Running, fields: dict[str, str], files: dict[str, bytes], param: str) -> None:
        base = running.generate(seed=3).data[0]
        fields = {name: base.id if value == "BASE" else value for name, value in fields.items()}
        answer = running.post("/v1/images/edits", data=fields, files=files or {"": b""})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param

    def test_refused_by_the_editor(self, running: Running) -> None:
        base = running.generate(seed=3).data[0]
        answer = running.post("/v1/images/edits", data={"prompt": CAT, "base": base.id})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "refused")
        assert "change at least one word" in answer.json()["error"]["message"]
        answer = running.post("/v1/images/edits", data={"prompt": CAT, "base": "p" + 22 * "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "picture_not_found")

    @pytest.mark.parametrize("name", ["image", "mask"])
    def test_files_that_are_no_pictures(self, running: Running, name: str) -> None:
        base = running.generate(seed=3).data[0]
        good = as_png(picture(base))
        frames = io.BytesIO()
        Image.new("RGB", (8, 8)).save(
            frames, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")], duration=9
        )
        for bad in (b"", b"GIF89a" + bytes(100), good[: len(good) // 2], bomb(), frames.getvalue()):
            files = {"image": good, "mask": transparent_left(), name: bad}
            answer = running.post("/v1/images/edits", data={"prompt": DOG}, files=files)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image"), bad[:8]
        empty = {"image": good, "mask": as_png(Image.new("L", (32, 32)))}
        answer = running.post("/v1/images/edits", data={"prompt": DOG}, files=empty)
        assert "marks nothing" in answer.json()["error"]["message"]


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it has 2^30 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2**15, 2**15, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**5)))
        + chunk(b"IEND", b"")
    )


class TestRunning:
    def test_health(self, running: Running) -> None:
        assert httpx.get(f"{running.url}/health").json() == {"status": "alive"}
        ready = httpx.get(f"{running.url}/ready")
        assert (ready.status_code, ready.json()) == (200, {"ready": True, "waiting": 0})

    @pytest.mark.parametrize("declared", [True, False])
    @pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
    def test_large_bodies(self, running: Running, path: str, declared: bool) -> None:
        body = b'{"prompt": "' + bytes([65]) * 2**20 + b'"}'
        kind = "multipart/form-data; boundary=b" if "edits" in path else "application/json"
        if "edits" in path:
            body = b'--b\r\nContent-Disposition: form-data; name="mask"; filename="m"\r\n\r\n' + body + b"\r\n--b--\r\n"
        pieces = (body[i : i + 2**15] for i in range(0, len(body), 2**15))
        answer = running.post(path, content=body if declared else pieces, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_much")

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_goes_ends_its_picture(self, running: Running, stream: bool) -> None:
        before = running.parts.library.count()
        body = {"prompt": CAT, "steps": 500, "seed": 77, "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/images/generations", json=body, timeout=0.5)
        assert running.generate(DOG, seed=78 + stream).data[0].reuse["kind"] == "none"
        assert running.parts.library.count() == before + 1
        assert running.parts.front.waiting == 0

    def test_a_client_that_goes_in_the_middle_of_a_stream(self, running: Running) -> None:
        before = running.parts.library.count()
        body = {"prompt": CAT, "steps": 500, "seed": 99, "stream": True, "partial_images": 3}
        with httpx.stream("POST", f"{running.url}/v1/images/generations", json=body, timeout=30) as answer:
            assert next(answer.iter_lines()) == "event: image_generation.partial_image"
        assert running.generate(DOG, seed=98).data[0].reuse["kind"] == "none"
        assert running.parts.library.count() == before + 1

    def test_an_error_in_the_middle_of_a_stream(self, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("a secret")

        monkeypatch.setattr(running.parts.library, "add", fail)
        with pytest.raises(openai.APIError, match="its log says why") as caught:
            list(running.generate(seed=40, stream=True, partial_images=1))
        assert "secret" not in str(caught.value)
        with pytest.raises(openai.InternalServerError, match="its log says why"):
            running.generate(seed=40)


def test_a_full_queue(tmp_path: Path, tiny_editor: Editor) -> None:
    with (
        service(tmp_path, tiny_editor, most_waiting=1) as parts,
        served(build_app(parts.front, DEFAULTS, LIMITS)) as url,
    ):
        running = Running(parts, url)
        long = threading.Thread(target=running.generate, kwargs={"seed": 1, "extra": {"steps": 60}})
        long.start()
        while not parts.front.waiting:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError) as caught:
            running.generate(seed=2)
        answer = caught.value.response
        assert (answer.status_code, caught.value.code) == (503, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        long.join()
        assert running.generate(seed=2).data


def test_a_token(tmp_path: Path, tiny_editor: Editor) -> None:
    with (
        service(tmp_path, tiny_editor) as parts,
        served(build_app(parts.front, DEFAULTS, LIMITS, token="s3cret")) as url,
    ):
        for wrong in ("any", "s3cre", "s3cret2"):
            with pytest.raises(openai.AuthenticationError, match="token"):
                Running(parts, url, wrong).generate()
        assert running_url(Running(parts, url, "s3cret")).status_code == 200
        assert httpx.delete(f"{url}/v1/pictures/p{22 * 'x'}").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200


def running_url(running: Running) -> httpx.Response:
    """A picture is given to whoever has its URL."""
    return httpx.get(running.generate(response_format="url").data[0].url)


def test_json_is_strict(running: Running) -> None:
    """What a client is given is JSON that every reader takes."""
    text = running.post("/v1/images/generations", json={"prompt": CAT, "seed": 3}).text

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(text, parse_constant=refuse)
