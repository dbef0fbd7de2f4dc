"""``fisedit-compile serve``: a service that answers requests from stored pictures where it can."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fisedit_compile.cli.config_fields import add_set_option, config_fields
from fisedit_compile.cli.edit_options import add_attention
from fisedit_compile.cli.runtime import add_runtime_options, finite, start, whole_number
from fisedit_compile.config import SparsityConfig

_EPILOG = """\
http://HOST:PORT/ is the page, http://HOST:PORT/v1 the base URL for clients of OpenAI's images API. docs/service.md has
the interface, its extensions, and what can go wrong. Whoever may ask shares all pictures: a service is for one group of
people who trust each other."""

_LOCAL = ("127.0.0.1", "::1", "localhost")

_SHORTEST_TOKEN = 16


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        help="answer requests over HTTP, from stored pictures where possible",
        description="Draw and edit pictures for clients of OpenAI's images API, on Ray Serve. A request that was "
        "answered before has its stored picture, one that is similar to a stored picture is an edit of that.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder of a diffusers pipeline")
    parser.add_argument(
        "--replicas",
        type=_replicas,
        metavar="N|MIN-MAX",
        help="processes that draw, with a GPU each where there are GPUs; a range lets Ray Serve choose by the load "
        "(default: one a GPU, or 1)",
    )
    parser.add_argument(
        "--store",
        type=Path,
        default=Path("out/service"),
        metavar="DIR",
        help="pictures and bases (default: out/service)",
    )
    parser.add_argument(
        "--store-gib", type=_gib, default=_gib("20"), metavar="X", help="what bases may take on the disk (default: 20)"
    )
    parser.add_argument(
        "--memory-gib",
        type=_gib,
        metavar="X",
        help="what the bases of one replica may take in memory (default: half of a GPU's that is free, or a quarter of "
        "the host's for all)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        choices=(1, 2, 4, 8),
        default=1,
        metavar="1|2|4|8",
        help="edits that wait at a replica and are made together, at most (default: 1)",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=whole_number(0, 65535), default=8000, metavar="N", help="(default: 8000)")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="holds the token that clients bring as API key; needed where --host is not this machine alone",
    )
    parser.add_argument(
        "--reuse",
        choices=("auto", "never"),
        default="auto",
        help="never draws each picture anew, by the pipeline as it is, and keeps no bases (default: auto)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="with --reuse never: the U-Net runs under torch.compile, which takes about a minute at the start",
    )
    parser.add_argument(
        "--similar",
        type=finite,
        nargs="+",
        metavar="X",
        help="cosine of two prompts from which one's picture is changed into the other's; a second one is for requests "
        "that name the seed of the picture (default: those of docs/service.md; one alone is for both)",
    )
    parser.add_argument(
        "--search-model",
        type=Path,
        metavar="DIR",
        help="text model of transformers that compares prompts (default: the pipeline's own text encoder)",
    )
    parser.add_argument(
        "--steps", type=whole_number(2), default=50, metavar="N", help="where a request does not say (default: 50)"
    )
    parser.add_argument(
        "--guidance", type=finite, default=7.5, metavar="X", help="where a request does not say (default: 7.5)"
    )
    parser.add_argument("--no-page", dest="page", action="store_false", help="serve the interface alone")
    add_attention(parser)
    add_set_option(parser)
    add_runtime_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serve until the process is told to end."""
    needed = ("ray", "fastapi", "uvicorn", *(["gradio"] if args.page else []))
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(f"serve needs {', '.join(missing)}: install this package's optional group 'serve'")
    token = _read_token(args.token_file) if args.token_file else None
    if args.host not in _LOCAL and token is None:
        raise ValueError(f"--host {args.host} lets others in: give --token-file")
    if args.compile and args.reuse != "never":
        raise ValueError("--compile: an editor records by graphs of its own; give it with --reuse never")
    config = {"attention": args.attention, **config_fields(args.set)}
    SparsityConfig.of(config)  # so that what is wrong with it is said at once
    device, dtype = start(args)

    import torch

    if device.index is not None:
        raise ValueError(f"--device {device}: each replica gets a GPU of its own, so give cuda (CUDA_VISIBLE_DEVICES)")
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    least, most = args.replicas or (gpus or 1, gpus or 1)
    if gpus and most > gpus:
        raise ValueError(f"--replicas {most}: each has a GPU of its own, and there are {gpus}")
    from fisedit_compile.serving.front import SIMILAR, SIMILAR_OF_SEED, FrontOptions
    from fisedit_compile.serving.replica import ReplicaOptions
    from fisedit_compile.serving.server import ServerOptions, serve

    replica = ReplicaOptions(
        model=str(args.model.resolve()),
        folder=str(args.store.resolve()),
        store_bytes=args.store_gib,
        memory_bytes=args.memory_gib,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        # All that a GPU leaves to the host is small: several threads would wait for each other, where programs compete.
        threads=args.threads or (1 if gpus else max(1, (os.cpu_count() or 1) // most)),
        replicas=most,
        batch=args.batch,
        keep_bases=args.reuse == "auto",
        compile=args.compile,
        config=config,
    )
    similar = args.similar or [SIMILAR, SIMILAR_OF_SEED]
    if len(similar) > 2:
        raise ValueError(f"--similar takes one or two numbers, not {len(similar)}")
    options = ServerOptions(
        host=args.host,
        port=args.port,
        token=token,
        front=FrontOptions(args.reuse, similar[0], similar[-1], at_once=most),
        steps=args.steps,
        guidance=args.guidance,
        search_model=args.search_model,
        page=args.page,
    )
    serve(options, replica, least, lambda url: print(f"ready: {url}", flush=True))


def _read_token(path: Path) -> str:
    token = path.read_text().strip()
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{path}: a token has at least {_SHORTEST_TOKEN} letters, digits and marks, and no space")
    return token


def _replicas(text: str) -> tuple[int, int]:
    least, _, most = text.partition("-")
    if not least.isdecimal() or not (most or least).isdecimal() or not 1 <= int(least) <= int(most or least):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of replicas nor a range such as 1-4")
    return int(least), int(most or least)


def _gib(text: str) -> int:
    value = finite(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of GiB above 0")
    return int(value * 2**30)
