"""The whole service as a user starts it: Ray Serve with two replicas, one of which is killed while it draws."""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from PIL import Image
from support.pipelines import tiny_pipeline
from support.services import CAT, DOG

from fisedit_compile import Editor, FiseditError
from fisedit_compile.bench.serving.processes import ServiceProcesses, running_service
from fisedit_compile.cli import main
from fisedit_compile.serving.held_bases import open_library, open_store
from fisedit_compile.serving.picture import BasePlace
from fisedit_compile.serving.picture_files import as_png, of_png
from fisedit_compile.serving.replica import ReplicaOptions
from fisedit_compile.serving.server import ServerOptions, serve

pytest.importorskip("ray")

pytestmark = pytest.mark.usefixtures("one_thread")

TOKEN = "a-token-of-the-tests"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


class Client:
    """Asks a service for single pictures."""

    def __init__(self, url: str) -> None:
        self.url = url

    def post(self, path: str, timeout: float = 120, **arguments: Any) -> dict[str, Any]:
        answer = httpx.post(f"{self.url}/v1/images/{path}", headers=HEADERS, timeout=timeout, **arguments)
        assert answer.status_code == 200, answer.text
        (data,) = answer.json()["data"]
        return data

    def generate(self, prompt: str, seed: int, **changes: Any) -> dict[str, Any]:
        return self.post("generations", json={"prompt": prompt, "seed": seed, **changes})


@contextmanager
def running(folder: Path) -> Iterator[tuple[ServiceProcesses, Client]]:
    model = folder / "model"
    tiny_pipeline().save_pretrained(model)
    (folder / "token").write_text(TOKEN)
    options = ["--model", str(model), "--store", str(folder / "store"), "--token-file", str(folder / "token")]
    options += ["--replicas", "2", "--steps", "4", "--guidance", "5", "--threads", "1", "--device", "cpu"]
    with running_service(options) as service:
        yield service, Client(service.url)


def picture(data: dict[str, Any]) -> Image.Image:
    return of_png(base64.b64decode(data["b64_json"]))


def test_a_replica_is_killed_and_everything_is_answered_right(tmp_path: Path) -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    with running(tmp_path) as (service, client):
        assert httpx.get(f"{service.url}/ready").json()["ready"]
        assert httpx.post(f"{service.url}/v1/images/generations", json={"prompt": CAT}).status_code == 401
        bases = [client.generate(CAT, seed) for seed in range(4)]
        with pytest.raises(httpx.ReadTimeout):  # nobody waits for it any more
            client.post("generations", timeout=0.3, json={"prompt": "a bird", "steps": 100})
        before = service.replicas()
        assert len(before) == 2
        with ThreadPoolExecutor(4) as clients:
            answers = [clients.submit(client.generate, DOG, seed, steps=24, reuse="never") for seed in range(4)]
            time.sleep(0.3)
            before[0].send_signal(signal.SIGKILL)
            drawn = [answer.result() for answer in answers]
        files = {"mask": as_png(mask)}
        edits = [client.post("edits", data={"prompt": DOG, "base": base["id"]}, files=files) for base in bases]
        stored = [client.generate(CAT, seed) for seed in range(4)]
        for _ in range(60):  # Ray collects what replicas counted every few seconds
            if "ray_fisedit_pictures" in (metrics := httpx.get(f"{service.url}/metrics", headers=HEADERS).text):
                break
            time.sleep(0.5)
        listening = {
            connection.laddr.ip
            for child in psutil.Process(service.process.pid).children(recursive=True)
            if "ray::ServeReplica" not in " ".join(child.cmdline())  # see docs/service.md
            for connection in child.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
    assert [each["reuse"]["kind"] for each in stored] == ["stored"] * 4
    assert [each["id"] for each in stored] == [each["id"] for each in bases]
    assert "ray_fisedit_pictures" in metrics
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    assert service.process.returncode == 0

    editor = Editor(tiny_pipeline(), {"attention": "full"})
    for seed, base in enumerate(bases):
        want = generate(editor, CAT, seed, 4)
        assert picture(base).tobytes() == want.image.tobytes()
        assert picture(edits[seed]).tobytes() == editor.edit(want, DOG, mask).image.tobytes()
        assert picture(drawn[seed]).tobytes() == generate(editor, DOG, seed, 24).image.tobytes()
    # No base is lost: those of the replica that ended well are written, the others' pictures can be edited as well.
    library, store = open_library(tmp_path / "store"), open_store(tmp_path / "store", 2**30)
    # Four new pictures, four drawn while a replica was killed, four edits; not the one that nobody waited for.
    assert library.count() == 12
    records = [library.get(each["id"]) for each in bases]
    assert all(record is not None and record.base is BasePlace.SAVED for record in records)
    assert {base.name for base in store.bases()} >= {each["id"] for each in bases}
    assert not [each for each in (tmp_path / "store" / "bases").iterdir() if each.name.endswith(".partial")]


def generate(editor: Editor, prompt: str, seed: int, steps: int) -> Any:
    return editor.generate(
        prompt,
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(seed),
        width=32,
        height=32,
    )


def test_two_services_do_not_share_a_folder(tmp_path: Path) -> None:
    import fcntl

    descriptor = os.open(tmp_path / "service.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    replica = ReplicaOptions("model", str(tmp_path), 1, None, "cpu", "float32", 1, 1)
    with pytest.raises(FiseditError, match="another service works in"):
        serve(ServerOptions(port=0), replica, 1, print)
    os.close(descriptor)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "lets others in: give --token-file"),
        (["--token-file", "short"], "a token has at least 16"),
        (["--store-gib", "0"], "no amount of GiB"),
        (["--replicas", "2-1"], "neither a number of replicas nor a range"),
        (["--device", "cuda:7"], "torch sees"),
        (["--compile"], "give it with --reuse never"),
        (["--similar", "0.9", "0.8", "0.7"], "takes one or two numbers, not 3"),
        (["--set", "strides=2"], "strides"),
        (["--set", "cross_replace=7"], "cross_replace=7"),
    ],
)
def test_options_that_cannot_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short").write_text("short\n")
    try:
        status = main(["serve", "--model", "nowhere", *options])
    except SystemExit as end:
        status = int(end.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err
