"""The page, in a real browser: a picture is made, edited in rounds, found and painted, and downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.http_server import served
from support.services import CAT, DOG, service

from fisedit_compile import Editor
from fisedit_compile.serving.protocol.app import build_app
from fisedit_compile.serving.protocol.limits import Defaults, Limits

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

from fisedit_compile.serving.page import mount_page  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULTS, LIMITS = Defaults(side=32, multiple=8, steps=4, guidance=5.0), Limits(pixels=64 * 64)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny_editor: Editor) -> Iterator[str]:
    with service(tmp_path_factory.mktemp("service"), tiny_editor, similar=1.01) as parts:
        app = mount_page(build_app(parts.front, DEFAULTS, LIMITS), parts.front, DEFAULTS, LIMITS, None)
        with served(app) as address:
            yield address


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium: neither chromium nor google-chrome is installed, and CHROMIUM is not set")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


def test_a_whole_edit(browser: Any, url: str) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    outside: list[str] = []
    page.on(
        "request",
        lambda request: None if request.url.startswith((url, "data:", "blob:")) else outside.append(request.url),
    )
    page.goto(url)
    said = page.locator("#said")
    page.locator("#edit").click()
    page.get_by_text("Make a picture first").wait_for()

    page.locator("#prompt textarea").fill(CAT)
    page.locator("#make").click()
    said.get_by_text("Drawn in").wait_for()
    page.locator("#picture img").wait_for()
    assert page.locator("#words textarea").input_value() == CAT

    page.locator("#words textarea").fill(DOG)
    page.locator("#edit").click()
    said.get_by_text("of the picture was computed").wait_for()
    page.locator("#slider img").first.wait_for()
    assert page.locator("#strip .grid-container button").count() == 2

    page.get_by_label("Where I paint").check()
    canvas = page.locator("#canvas canvas").first
    canvas.wait_for()
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(500)  # the canvas takes its size
    box = canvas.bounding_box()
    page.locator("#words textarea").fill("an apple on the left")
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5, steps=5)
    page.mouse.up()
    page.locator("#edit").click()
    page.locator("#strip .grid-container button").nth(2).wait_for()
    said.get_by_text("of the picture was computed").wait_for()

    page.locator("#strip .grid-container button").first.click()
    said.get_by_text("Drawn in").wait_for()
    assert page.locator("#words textarea").input_value() == CAT
    link = said.get_by_role("link", name="Download").get_attribute("href")
    assert httpx.get(f"{url}/{link}").headers["content-type"] == "image/png"
    assert outside == []


def test_the_interface_is_beside_the_page(url: str) -> None:
    assert "fisedit-compile" in httpx.get(url).text
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{url}/health").json() == {"status": "alive"}


def test_the_token_is_the_password(tmp_path: Path, tiny_editor: Editor) -> None:
    with service(tmp_path, tiny_editor) as parts:
        app = build_app(parts.front, DEFAULTS, LIMITS, token="s3cret-token")
        with served(mount_page(app, parts.front, DEFAULTS, LIMITS, "s3cret-token")) as url:
            assert httpx.get(f"{url}/config").status_code == 401
            for password, status in (("s3cret", 400), ("s3cret-token", 200)):
                with httpx.Client() as client:
                    login = client.post(f"{url}/login", data={"username": "me", "password": password})
                    assert login.status_code == status
                    assert (client.get(f"{url}/config").status_code == 200) == (status == 200)
