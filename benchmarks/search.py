"""How long a search of many stored requests takes, and that it finds what a product of all embeddings finds.

    OPENBLAS_NUM_THREADS=1 python benchmarks/search.py --width 768 --stored 100000

Embeddings are made up, with what those of prompts have (``examples/demo_model``): they share most of their length, and
differ less and less from one direction to the next. ``--spread`` makes them differ in all directions alike, the worst
that there is. Requests are stored ones that were changed a little, and others; printed are the times of both.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from tabulate import tabulate

from fisedit_compile.cli.runtime import whole_number
from fisedit_compile.serving.front import SIMILAR
from fisedit_compile.serving.search import Embeddings

#: Share of an embedding's square length that all have in common, and the power by which directions matter less.
_COMMON, _POWER = 0.82, 1.2

#: How much a request differs from a stored one: a cosine of about 0.98.
_CHANGE = 0.2


def main(argv: list[str] | None = None) -> None:
    """Store, search, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", type=whole_number(1), default=100_000, metavar="N")
    parser.add_argument("--width", type=whole_number(1), default=768, metavar="N", help="numbers of an embedding")
    parser.add_argument("--requests", type=whole_number(1), default=50, metavar="N", help="of each kind")
    parser.add_argument("--spread", action="store_true", help="embeddings differ in all directions alike")
    args = parser.parse_args(argv)
    chance = np.random.default_rng(0)
    stored = embeddings(chance, args.stored, args.width, spread=args.spread)
    found = Embeddings(args.width)
    for i, each in enumerate(stored):
        found.put(str(i), i, each)
    near = stored[chance.integers(0, args.stored, args.requests)]
    near = unit(near + _CHANGE * unit(chance.standard_normal(near.shape, np.float32)))
    others = embeddings(chance, args.requests, args.width, spread=args.spread)
    rows = [
        ["the first request, for which directions are found", search(found, stored, near[:1])],
        ["one like a stored one", search(found, stored, near)],
        ["any other", search(found, stored, others)],
        ["a product of all rows", median_ms(lambda each: stored @ each, near)],
    ]
    print(tabulate(rows, [f"{args.stored:,} of {args.width} numbers", "ms"], tablefmt="github", floatfmt=".2f"))


def search(found: Embeddings, stored: np.ndarray, requests: np.ndarray) -> float:
    """The median of the milliseconds of requests, whose answers are held to a product of all rows."""
    milliseconds = median_ms(lambda each: found.nearest(each, None, SIMILAR), requests)
    for each in requests:
        nearest, cosines = found.nearest(each, None, SIMILAR), stored @ each
        assert nearest is not None
        if (nearest[1] >= SIMILAR) != (cosines.max() >= SIMILAR) or (
            nearest[1] >= SIMILAR and int(nearest[0]) != cosines.argmax()
        ):
            raise AssertionError(f"found {nearest}, and the most similar is {cosines.argmax()}: {cosines.max()}")
    return milliseconds


def median_ms(run: Callable[[np.ndarray], object], requests: np.ndarray) -> float:
    seconds = []
    for each in requests:
        begun = time.perf_counter()
        run(each)
        seconds.append(time.perf_counter() - begun)
    return float(np.median(seconds)) * 1e3


def embeddings(chance: np.random.Generator, count: int, width: int, *, spread: bool) -> np.ndarray:
    """Made up, float32 ``[count, width]``, of length 1."""
    values = chance.standard_normal((count, width), np.float32)
    if spread:
        return unit(values)
    values = unit(values / np.arange(1, width + 1, dtype=np.float32) ** (_POWER / 2)) * float(np.sqrt(1 - _COMMON))
    values[:, -1] += float(np.sqrt(_COMMON))  # in a direction of little else
    turned, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((width, width)))
    return unit(values @ turned).astype(np.float32)


def unit(values: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = np.linalg.norm(values, axis=-1, keepdims=True)
    return values / lengths


if __name__ == "__main__":
    main()
