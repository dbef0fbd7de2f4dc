"""The whole service: pictures and bases in a folder, replicas that draw, the interface and the page over HTTP."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from fisedit_compile.errors import FiseditError
from fisedit_compile.serving.cluster import running_replicas
from fisedit_compile.serving.front import Front, FrontOptions
from fisedit_compile.serving.held_bases import note_saved_bases, open_library, open_store
from fisedit_compile.serving.protocol.app import build_app
from fisedit_compile.serving.protocol.limits import Defaults, Limits
from fisedit_compile.serving.replica import ReplicaOptions
from fisedit_compile.serving.words import WordEncoder

#: How long requests may go on when the service is told to end.
_LAST_SECONDS = 30


@dataclass(frozen=True)
class ServerOptions:
    """How a service is reached, and how it answers.

    Attributes:
        host, port: to listen on; port 0 takes a free one.
        token: that clients have to bring; None lets everyone in.
        front: see :class:`~fisedit_compile.serving.front.FrontOptions`.
        steps, guidance: where a request does not say.
        search_model: folder of the text model that compares prompts; None is the pipeline's own text encoder.
        page: whether there is a page at ``/``.
        limits: of requests.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    front: FrontOptions = field(default_factory=FrontOptions)
    steps: int = 50
    guidance: float = 7.5
    search_model: Path | None = None
    page: bool = True
    limits: Limits = field(default_factory=Limits)


def serve(
    options: ServerOptions, replica: ReplicaOptions, least_replicas: int, announce: Callable[[str], None]
) -> None:
    """Serve until the process is told to end.

    Args:
        options: see :class:`ServerOptions`.
        replica: of each replica.
        least_replicas: see :func:`~fisedit_compile.serving.cluster.running_replicas`.
        announce: called with the URL when requests are answered.

    Raises:
        FiseditError: another service has the folder, or the replicas cannot be started.
        OSError: the address cannot be listened on.
        ValueError: a folder of no text model.
    """
    folder = Path(replica.folder)
    with _alone(folder), _listening(options.host, options.port) as listening:
        library, store = open_library(folder, check=True), open_store(folder, replica.store_bytes)
        store.evict()
        note_saved_bases(store, library, held=False)
        with running_replicas(replica, least_replicas) as replicas:
            facts = asyncio.run(replicas.facts())
            words = WordEncoder.of_folder(options.search_model or Path(replica.model))
            front = Front(library, store, words, facts.digest, replicas, options.front)
            defaults = Defaults(facts.side, facts.multiple, options.steps, options.guidance)
            app = build_app(
                front,
                defaults,
                options.limits,
                token=options.token,
                ready=replicas.ready,
                metrics=replicas.metrics,
            )
            if options.page:
                from fisedit_compile.serving.page import mount_page

                app = mount_page(app, front, defaults, options.limits, options.token)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_LAST_SECONDS)
            host, port = listening.getsockname()[:2]
            signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn ends by it and raises it again, and Ray would exit
            announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            uvicorn.Server(config).run(sockets=[listening])
        library.close()


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=128) as listening:
        yield listening


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within the context no other service has the folder: it would take bases that are not written yet for lost."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "service.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FiseditError(f"another service works in {folder}: give each a folder of its own") from None
        yield
    finally:
        os.close(descriptor)
