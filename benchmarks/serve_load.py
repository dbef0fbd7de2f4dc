"""Users of a service, many at once, and what they get: throughput, latencies, what was reused, and what went wrong.

    python benchmarks/serve_load.py --trace rounds --requests 200 --rate 2 --json out/auto.json
    python benchmarks/serve_load.py --trace rounds --requests 200 --rate 2 --reuse never --json out/never.json
    python benchmarks/serve_load.py --trace rounds --requests 200 --clients 4 --replicas 2 --kill-every 40 --check 10

The service is started for the test, on this machine alone, in a folder of its own, and ended behind it. ``rounds`` are
users who make a picture and change one thing of it one to five times, by words alone; ``zipf`` single requests, some
of which are popular. With ``--kill-every`` a replica is killed again and again; then every picture that was answered
has to be there, and every base to be loaded or drawn again. ``--check`` draws answers once more, by an editor in this
process, and compares them to the bit, or but for rounding where an edit was made with others, which is meant for CPUs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image, ImageChops

from fisedit_compile import Editor
from fisedit_compile.bench.serving.clients import Outcome, run_trace
from fisedit_compile.bench.serving.processes import ServiceProcesses, running_service
from fisedit_compile.bench.serving.report import summarise
from fisedit_compile.bench.serving.trace import TRACES, User
from fisedit_compile.cli.runtime import add_runtime_options, describe, start
from fisedit_compile.editing.plain_pipeline import load_pipeline
from fisedit_compile.quality.judge import Judge
from fisedit_compile.serving.picture_files import as_png, of_png
from fisedit_compile.serving.recall import MOST_OFF

MODEL = Path(__file__).parents[1] / "examples" / "demo_model"

#: Options that a report names.
_OPTIONS = ("trace", "rate", "clients", "reuse", "compile", "similar", "replicas", "batch", "steps", "guidance", "seed")

#: No test is larger, or longer in seconds.
MOST_REQUESTS, MOST_SECONDS = 10_000, 3600


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, metavar="DIR", help="(default: the demo model)")
    parser.add_argument("--trace", choices=sorted(TRACES), default="rounds")
    parser.add_argument("--requests", type=int, default=60, metavar="N")
    parser.add_argument("--rate", type=float, metavar="R", help="requests a second, at random times")
    parser.add_argument(
        "--clients", type=int, default=4, metavar="N", help="users at once, without --rate (default: 4)"
    )
    parser.add_argument("--reuse", choices=("auto", "never"), default="auto")
    parser.add_argument("--compile", action="store_true", help="see fisedit-compile serve")
    parser.add_argument("--similar", nargs="+", metavar="X", help="see fisedit-compile serve")
    parser.add_argument("--replicas", default="1", metavar="N")
    parser.add_argument("--batch", type=int, metavar="N", help="edits that are made together at most")
    parser.add_argument("--steps", type=int, default=50, metavar="N")
    parser.add_argument("--guidance", type=float, default=5.0, metavar="X")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the trace and of what is killed")
    parser.add_argument("--kill-every", type=int, metavar="N", help="answers behind which a replica is killed")
    parser.add_argument("--check", type=int, default=0, metavar="N", help="answers to draw again (default: none)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_runtime_options(parser)
    args = parser.parse_args(argv)
    if not 0 < args.requests <= MOST_REQUESTS:
        parser.error(f"--requests: 1 to {MOST_REQUESTS}")
    device, dtype = start(args)
    users = TRACES[args.trace](args.requests, args.seed)
    options = ["--model", str(args.model), "--replicas", args.replicas, "--steps", str(args.steps)]
    options += ["--guidance", str(args.guidance), "--reuse", args.reuse, "--device", device.type, "--dtype", args.dtype]
    options += ["--threads", str(args.threads)] if args.threads else []
    options += ["--batch", str(args.batch)] if args.batch else []
    options += ["--similar", *args.similar] if args.similar else []
    options += ["--compile"] if args.compile else []

    with tempfile.TemporaryDirectory(prefix="serve-load-") as folder:
        begun = time.perf_counter()
        with running_service([*options, "--store", folder]) as service:
            ready = time.perf_counter() - begun
            begun = time.perf_counter()
            outcomes = asyncio.run(asyncio.wait_for(_run(args, service, users), MOST_SECONDS))
            wall = time.perf_counter() - begun
            lost = _lost(service.url, Path(folder), outcomes, args.clients) if args.kill_every else []
    judge = Judge.load(args.model / "judge") if (args.model / "judge").is_dir() else None
    wrong = _wrong(args, device, dtype, outcomes)
    values: dict[str, Any] = {
        **summarise(outcomes, wall, judge),
        "ready_seconds": ready,
        "kill_every": args.kill_every,
        "killed": service.killed,
        "bases_lost": lost,
        "checked": min(args.check, len(outcomes)),
        "wrong": wrong,
        **{name: getattr(args, name) for name in _OPTIONS},
        "model": str(args.model),
        "command": " ".join(sys.argv),
        **describe(device, dtype),
    }
    text = json.dumps(values, indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
    if values["errors"] or lost or wrong:
        sys.exit("requests failed, bases were lost, or pictures were wrong")


async def _run(args: argparse.Namespace, service: ServiceProcesses, users: list[User]) -> list[Outcome]:
    chance = random.Random(args.seed)

    def answered(count: int) -> None:
        if args.kill_every and count % args.kill_every == 0 and count < args.requests:
            service.kill_one(chance)

    return await run_trace(service.url, users, rate=args.rate, at_once=args.clients, seed=args.seed, answered=answered)


def _lost(url: str, store: Path, outcomes: list[Outcome], at_once: int) -> list[str]:
    """Names of pictures that are gone, or whose bases are neither in the store nor drawn again for an edit."""
    saved = {folder.name for folder in (store / "bases").iterdir()}
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 0, 4, 4))

    def is_there(picture: dict[str, Any]) -> bool:
        there = httpx.get(f"{url}/v1/pictures/{picture['id']}").status_code == 200
        if there and picture["reuse"]["kind"] == "none" and picture["id"] not in saved:
            form = {"base": picture["id"], "prompt": "a cat on the left and a dog on the right, in the snow"}
            answer = httpx.post(f"{url}/v1/images/edits", data=form, files={"mask": as_png(mask)}, timeout=600)
            there = answer.status_code == 200
        return there

    pictures = [each.picture for each in outcomes if not each.error]
    with ThreadPoolExecutor(at_once) as clients:
        return [each["id"] for each, there in zip(pictures, clients.map(is_there, pictures), strict=True) if not there]


def _wrong(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, outcomes: list[Outcome]) -> list[str]:
    """Names of those pictures, of some, that an editor in this process does not draw the same."""
    if not args.check:
        return []
    pipe = load_pipeline(args.model, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    editor, made = Editor(pipe), {each.picture["id"]: each for each in outcomes if not each.error}
    chosen = random.Random(args.seed).sample(sorted(made), min(args.check, len(made)))
    return [name for name in chosen if not _is_right(made[name], _again(args, editor, made, name))]


def _is_right(answered: Outcome, again: Image.Image) -> bool:
    off = ImageChops.difference(of_png(answered.png), again).getextrema()
    report = answered.picture["report"]
    rounds_otherwise = report.get("made_together", 1) > 1 or not report.get("recorded", True)
    return max(most for _, most in off) <= (MOST_OFF if rounds_otherwise else 0)


def _again(args: argparse.Namespace, editor: Editor, made: dict[str, Outcome], name: str) -> Image.Image:
    """The picture of an answer, drawn by an editor."""
    picture, reuse = made[name].picture, made[name].picture["reuse"]
    prompt = made[reuse["base"]].asked.prompt if reuse["kind"] == "edit" else made[name].asked.prompt
    base = editor.generate(
        prompt,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=torch.Generator().manual_seed(picture["seed"]),
    )
    image: Image.Image = editor.edit(base, made[name].asked.prompt).image if reuse["kind"] == "edit" else base.image
    return image


if __name__ == "__main__":
    main()
