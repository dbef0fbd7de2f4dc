"""How much a service gains by reusing pictures: the same trace on one that does, and on one that draws all anew.

    python benchmarks/serve_compare.py --requests 200 --clients 16 --device cuda --json out/compare.json

The opponent is the same server with ``--reuse never --compile``: the pipeline itself, its U-Net under
``torch.compile``, recording nothing. Each is started alone and plays three parts, each of other pictures: as many users
as keep it busy (``--clients``), three times, of which the median is its throughput; requests at random times at half of
the opponent's throughput, of which latencies are compared; and one user alone, whose latencies say what the service
adds to the time in which a picture is computed. Success is the judge's of ``fisedit-compile quality``: how many answers
show what was asked for, of the same requests on both servers: of all, of those that change a picture, and of those that
the service answered by an edit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fisedit_compile.bench.progress import say
from fisedit_compile.bench.serving.clients import Outcome, run_trace
from fisedit_compile.bench.serving.processes import running_service
from fisedit_compile.bench.serving.report import compare_success, summarise
from fisedit_compile.bench.serving.trace import TRACES
from fisedit_compile.cli.runtime import add_runtime_options, describe, finite, start, whole_number
from fisedit_compile.quality.judge import Judge

MODEL = Path(__file__).parents[1] / "examples" / "demo_model"

#: The parts that each server plays, and how often the first one.
BUSY, HALF, ALONE = "busy", "half_rate", "alone"
TIMES = 3


@dataclass
class Played:
    """What came of one part: all outcomes, the seconds that it took, and the answers a second of each time."""

    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0
    rates: list[float] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        return median(self.rates)


Parts = dict[str, Played]


def main(argv: list[str] | None = None) -> None:
    """Play, compare, and print the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=MODEL, metavar="DIR", help="with a judge (default: the demo model)"
    )
    parser.add_argument("--trace", choices=sorted(TRACES), default="rounds")
    parser.add_argument(
        "--requests", type=whole_number(1, 10_000), default=200, metavar="N", help="of the first two parts"
    )
    parser.add_argument("--alone", type=whole_number(1), default=30, metavar="N", help="requests of the third part")
    parser.add_argument(
        "--clients", type=whole_number(1), default=16, metavar="N", help="users at once, in the first part"
    )
    parser.add_argument("--replicas", type=whole_number(1), default=1, metavar="N")
    parser.add_argument("--batch", type=whole_number(1), metavar="N", help="edits that are made together at most")
    parser.add_argument("--similar", nargs="+", metavar="X", help="see fisedit-compile serve")
    parser.add_argument("--steps", type=whole_number(2), default=50, metavar="N")
    parser.add_argument("--guidance", type=finite, default=5.0, metavar="X")
    parser.add_argument("--eager", action="store_true", help="the opponent's U-Net is not compiled, as on most CPUs")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the traces")
    parser.add_argument("--json", type=Path, metavar="FILE")
    add_runtime_options(parser)
    args = parser.parse_args(argv)
    device, dtype = start(args)
    judge = Judge.load(args.model / "judge")

    shared = ["--model", str(args.model), "--replicas", str(args.replicas), "--steps", str(args.steps)]
    shared += ["--guidance", str(args.guidance), "--device", device.type, "--dtype", args.dtype]
    shared += ["--threads", str(args.threads)] if args.threads else []
    reusing = ["--batch", str(args.batch)] if args.batch else []
    reusing += ["--similar", *args.similar] if args.similar else []
    anew = ["--reuse", "never", *([] if args.eager else ["--compile"])]

    theirs, their_ready = _play(args, "the opponent", [*shared, *anew], None)
    rate = theirs[BUSY].throughput / 2
    ours, our_ready = _play(args, "the service", [*shared, *reusing], rate)
    say("looking at the pictures ...")
    values: dict[str, Any] = {
        "throughput_ratio": ours[BUSY].throughput / theirs[BUSY].throughput,
        "throughputs": {"service": ours[BUSY].rates, "opponent": theirs[BUSY].rates},
        "half_rate": rate,
        "success": compare_success(_pictures(ours), _pictures(theirs), judge),
        "service": {**_summaries(ours), "ready_seconds": our_ready},
        "opponent": {**_summaries(theirs), "ready_seconds": their_ready},
        **{name: getattr(args, name) for name in ("trace", "clients", "replicas", "batch", "similar", "steps", "seed")},
        "command": " ".join(sys.argv),
        **describe(device, dtype),
    }
    values["p95_at_half_rate"] = {
        who: values[who][HALF]["latency"]["all"].get("p95") for who in ("service", "opponent")
    }
    text = json.dumps(values, indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n")
    if any(values[who][part]["errors"] for who in ("service", "opponent") for part in (BUSY, HALF, ALONE)):
        sys.exit("requests failed")


def _play(args: argparse.Namespace, who: str, options: Sequence[str], rate: float | None) -> tuple[Parts, float]:
    """What came of the parts, and the seconds until the server was ready.

    Without a rate the second part's is half of what the first one shows.
    """
    say(f"{who}: {' '.join(options)} ...")
    parts: Parts = {part: Played() for part in (BUSY, HALF, ALONE)}
    requests = {BUSY: args.requests, HALF: args.requests, ALONE: args.alone}
    order = [*[BUSY] * TIMES, HALF, ALONE]
    with tempfile.TemporaryDirectory(prefix="serve-compare-") as folder:
        begun = time.perf_counter()
        with running_service([*options, "--store", folder]) as service:
            ready = time.perf_counter() - begun
            for number, part in enumerate(order):
                seed, played = len(order) * args.seed + number, parts[part]
                at = None if part != HALF else rate or parts[BUSY].throughput / 2
                users = TRACES[args.trace](requests[part], seed)
                clients = args.clients if part == BUSY else 1
                begun = time.perf_counter()
                trace = run_trace(service.url, users, rate=at, at_once=clients, seed=seed, answered=lambda _: None)
                outcomes, seconds = asyncio.run(trace), time.perf_counter() - begun
                played.outcomes += outcomes
                played.seconds += seconds
                played.rates.append(sum(not each.error for each in outcomes) / seconds)
                say(f"{who}, {part}: {played.rates[-1]:.2f} answers a second")
    return parts, ready


def _pictures(parts: Parts) -> list[Outcome]:
    """Of the parts of which both servers play the same."""
    return parts[BUSY].outcomes + parts[HALF].outcomes


def _summaries(parts: Parts) -> dict[str, Any]:
    return {part: summarise(played.outcomes, played.seconds, None) for part, played in parts.items()}


if __name__ == "__main__":
    main()
