"""The load test's parts: its traces, its users against a service in this process, and what is made of their answers."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from support.demo_pipelines import EXAMPLES, demo_pipeline
from support.http_server import served
from support.pipelines import CONFIG
from support.services import service

from fisedit_compile import Editor
from fisedit_compile.bench.serving.clients import Outcome, run_trace
from fisedit_compile.bench.serving.report import compare_success, summarise
from fisedit_compile.bench.serving.trace import ROUNDS, TRACES, User
from fisedit_compile.quality.judge import Judge
from fisedit_compile.serving.protocol.app import build_app
from fisedit_compile.serving.protocol.limits import Defaults

pytestmark = pytest.mark.usefixtures("one_thread")


def differing(one: str, other: str) -> int:
    """How many of the three parts of two prompts differ."""
    parts = [
        prompt.replace(" on the right, ", " on the left and ").split(" on the left and ") for prompt in (one, other)
    ]
    return sum(a != b for a, b in zip(*parts, strict=True))


class TestTraces:
    @pytest.mark.parametrize("name", TRACES)
    def test_are_the_same_each_time_and_as_long_as_asked_for(self, name: str) -> None:
        for requests in (1, 7, 100):
            users = TRACES[name](requests, 3)
            assert users == TRACES[name](requests, 3)
            assert sum(map(len, users)) == requests
        assert users != TRACES[name](100, 4)

    def test_rounds_change_one_thing_and_keep_the_seed(self) -> None:
        users = TRACES["rounds"](300, 0)
        assert {len(user) for user in users[:-1]} == set(range(1 + ROUNDS[0], 2 + ROUNDS[1]))
        for user in users:
            assert len({asked.seed for asked in user}) == 1
            assert all(differing(a.prompt, b.prompt) == 1 for a, b in pairwise(user))

    def test_some_are_popular(self) -> None:
        counts = Counter(asked.prompt for (asked,) in TRACES["zipf"](500, 0)).most_common()
        assert counts[0][1] > 5 * counts[len(counts) // 2][1]


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor(demo_pipeline(), CONFIG)


@pytest.mark.parametrize("rate", [None, 50.0])
def test_users_of_a_service(tmp_path: Path, editor: Editor, rate: float | None) -> None:
    answered: list[int] = []
    with service(tmp_path, editor, similar=0.5, most_waiting=2) as parts:
        app = build_app(parts.front, Defaults(side=32, multiple=8, steps=4, guidance=5.0))
        with served(app) as url:

            def run(users: list[User], clients: int) -> list[Outcome]:
                return asyncio.run(run_trace(url, users, rate=rate, at_once=clients, seed=0, answered=answered.append))

            users = TRACES["rounds"](8, 1)
            outcomes = run(users, 2)
            again = run(users, 2)
    assert answered == [*range(1, 9)] * 2
    assert sorted(each.asked.prompt for each in outcomes) == sorted(asked.prompt for user in users for asked in user)
    judge = Judge.load(EXAMPLES / "demo_model" / "judge")
    report = summarise(outcomes, 2.0, judge)
    assert (report["requests"], report["answered"], report["errors"]) == (8, 8, [])
    assert report["requests_per_second"] == 4
    assert report["reused"]["edit"] >= 1
    assert report["made_together"] == {1: report["reused"]["edit"]}
    assert report["latency"]["all"]["p50"] > 0
    assert 0 <= report["shows_what_was_asked"] <= 1
    assert report["beyond_drawing"]["p50"] > 0
    edited = sum(each.picture["reuse"]["kind"] == "edit" for each in outcomes)
    shares = compare_success(outcomes, [*reversed(outcomes)], judge)
    assert {name: of["requests"] for name, of in shares.items()} == {
        "all": 8,
        "changes": 8 - len(users),
        "edited": edited,
    }
    assert all(of["service"] == of["opponent"] for of in shares.values())
    assert shares["all"]["service"] == report["shows_what_was_asked"]
    assert shares["changes"]["service"] == report["of_changes"]
    assert shares["changes"]["opponent_what_changes"] == report["what_changes"]
    assert 0 <= report["what_changes"] <= 1
    assert summarise(again, 1.0, None)["reused"] == {"stored": 8}


def test_a_trace_says_what_each_request_changes() -> None:
    for user in TRACES["rounds"](40, 2):
        assert user[0].changed == ""
        for before, after in pairwise(user):
            same = [place for place in ("left", "right") if before.scene.items[place] == after.scene.items[place]]
            same += ["background"] if before.scene.background == after.scene.background else []
            assert {"left", "right", "background"} - {*same} <= {after.changed}


def test_errors_are_counted() -> None:
    (user,) = TRACES["rounds"](1, 0)
    report = summarise([Outcome(user[0], 1.0, 3, "no", {})], 1.0, None)
    assert (report["answered"], report["errors"], report["refused"]) == (0, ["no"], 3)
    assert report["latency"]["all"] == {}
