"""The service on Ray Serve: replicas that draw, and who sends them requests.

Ray listens on loopback alone and asks for a token of this run, its usage reports and dashboard are off. HTTP is not
Serve's but the front's own (``docs/service.md`` says why), so that the front talks to the replicas directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import socket
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from fisedit_compile.serving.errors import PainterGoneError
from fisedit_compile.serving.replica import PipelineFacts, ReplicaOptions, build_worker, facts_of
from fisedit_compile.serving.requests import Answer, Event, Job

logger = logging.getLogger(__name__)

_APP = "fisedit"

#: Requests that are sent to one replica on a CPU: those that it draws, and some that wait there for the bases that it
#: holds, as many as it makes together at least. Others go to the next replica that has room, which reads these bases.
_AT_ONCE = 4

#: The same on a GPU: as many as may wait at all. Bases are not written there while somebody waits, so that another
#: replica would have to draw them again.
_AT_ONCE_ON_GPU = 1024

#: Seconds behind which a request that waits asks again at the latest: a picture may take less than Serve's own 0.5.
_ASK_AGAIN = 0.05

#: What is told of all that Ray counts: lines, their help and their types.
_OURS = re.compile(r"(# (HELP|TYPE) )?ray_(fisedit|serve)_")

#: How often a request is given to another replica when the one that had it dies.
_MOST_TRIES = 5

#: Serve's own router by which requests of one picture come to one replica, and to the next where that is full or gone.
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

#: Read by Ray when it is imported. The second has Ray's processes listen on 127.0.0.1, on Linux as on other systems;
#: Ray would give its workers the lowest priority but four, so that whatever else runs would slow them down.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_worker_niceness": "0",
    "RAY_metrics_report_interval_ms": "2000",
    "RAY_SERVE_SESSION_ID_HEADER_KEY": "x-fisedit-picture",
}


class Replica:
    """What runs in the process of a replica."""

    def __init__(self, options: ReplicaOptions) -> None:
        from ray.serve.metrics import Counter, Gauge, Histogram

        logging.getLogger("fisedit_compile").setLevel(logging.INFO)
        self._worker = build_worker(options)
        self._facts = facts_of(self._worker.engine.editor)
        kinds = {"tag_keys": ("reuse",)}
        self._pictures = Counter("fisedit_pictures", "Pictures that were drawn", **kinds)
        self._failed = Counter("fisedit_failed", "Requests that ended with an error", tag_keys=("error",))
        boundaries = [0.05 * 2**i for i in range(14)]
        self._seconds = Histogram("fisedit_picture_seconds", "Time of a picture", boundaries=boundaries, **kinds)
        self._saved = Counter("fisedit_saved_seconds", "What new pictures would have taken more")
        self._held = Gauge("fisedit_held_bytes", "Bases in the memory of the replica")

    async def facts(self) -> PipelineFacts:
        """What a front has to know."""
        return self._facts

    async def draw(self, job: Job, progress: bool, partial_pictures: int) -> AsyncIterator[Event]:
        """See :meth:`~fisedit_compile.serving.worker.Worker.draw`."""
        try:
            async for event in self._worker.draw(job, progress=progress, partial_pictures=partial_pictures):
                if isinstance(event, Answer):
                    self._count(event)
                yield event
        except Exception as error:
            self._failed.inc(tags={"error": type(error).__name__})
            raise

    async def answer(self, job: Job) -> Answer:
        """The answer of a job whose steps nobody watches: one message between processes instead of a stream."""
        *_, answer = [event async for event in self.draw(job, progress=False, partial_pictures=0)]
        assert isinstance(answer, Answer)
        return answer

    def _count(self, answer: Answer) -> None:
        kind = {"reuse": answer.reuse.kind}
        self._pictures.inc(tags=kind)
        self._seconds.observe(answer.seconds, tags=kind)
        if (answer.reuse.seconds_saved or 0) > 0:
            self._saved.inc(answer.reuse.seconds_saved)
        self._held.set(self._worker.engine.bases.nbytes)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was not even made
            self._worker.close()


class Replicas:
    """The painter whose jobs are drawn by replicas.

    Args:
        handle: of their deployment.
        metrics_port: where Ray tells what it counted.
    """

    def __init__(self, handle: Any, metrics_port: int) -> None:
        self._handle, self._metrics_port = handle, metrics_port

    async def draw(self, job: Job, *, progress: bool = False, partial_pictures: int = 0) -> AsyncIterator[Event]:
        """The steps and the answer of a job, by the replica that holds its base; if that one dies, by another.

        Raises:
            PainterGoneError: one after the other died, or there is none.
            FiseditError, ValueError: see :meth:`~fisedit_compile.serving.engine.Engine.draw`.
        """
        from ray.exceptions import RayActorError, RayTaskError
        from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

        watched = progress or partial_pictures > 0
        handle = self._handle.options(stream=watched, session_id=job.route)
        for _ in range(_MOST_TRIES):
            response = handle.draw.remote(job, progress, partial_pictures) if watched else handle.answer.remote(job)
            try:
                if watched:
                    async for event in response:
                        yield event
                else:
                    yield await response
                return
            except RayTaskError as error:
                raise error.cause from None  # as it was raised, without the trace of the other process
            except DeploymentUnavailableError as error:
                raise PainterGoneError("no replica can be started: the service's log says why") from error
            except (RayActorError, ReplicaUnavailableError) as error:
                logger.warning("a replica died while it drew %s, which is drawn again: %s", job.id, _first_line(error))
                await asyncio.sleep(0.1)  # until the router knows
            finally:
                response.cancel()  # where nobody waits any more; else it has ended
        raise PainterGoneError(f"{_MOST_TRIES} replicas died of this request, one after the other")

    async def facts(self) -> PipelineFacts:
        """What a front has to know of the pipeline."""
        facts: PipelineFacts = await self._handle.facts.remote()
        return facts

    async def ready(self) -> bool:
        """Whether the replicas run."""
        from ray import serve

        status = await asyncio.to_thread(serve.status)
        return _APP in status.applications and status.applications[_APP].status == "RUNNING"

    async def metrics(self) -> str:
        """What was counted, in Prometheus' format."""
        return await asyncio.to_thread(self._read_metrics)

    def _read_metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return "".join(line for line in text.splitlines(keepends=True) if _OURS.match(line))


@contextmanager
def running_replicas(options: ReplicaOptions, least: int) -> Iterator[Replicas]:
    """Within the context replicas run, on Ray processes of their own; entered when all are ready.

    Args:
        options: of each; ``options.replicas`` is how many Serve may start when they are busy.
        least: how many run in any case.

    Raises:
        FiseditError: they cannot be started; Ray's log says why.
    """
    if "ray" in sys.modules:
        raise RuntimeError("Ray was imported before its environment was set")
    os.environ.update(_ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray
    from ray import serve

    on_gpu = options.device.startswith("cuda")
    port = _free_port()
    ray.init(
        address="local",
        num_cpus=options.replicas,
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=True,
        _metrics_export_port=port,
    )
    try:
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(http_options={"location": "NoServer"}, logging_config=quiet)
        scale: dict[str, Any] = {"num_replicas": least}
        if options.replicas > least:
            scale = {"autoscaling_config": {"min_replicas": least, "max_replicas": options.replicas}}
        deployment = serve.deployment(Replica).options(
            **scale,
            max_ongoing_requests=_AT_ONCE_ON_GPU if on_gpu else max(_AT_ONCE, 2 * options.batch),
            ray_actor_options={"num_cpus": 1, "num_gpus": int(on_gpu)},
            request_router_config={
                "request_router_class": _ROUTER,
                "request_router_kwargs": {"num_fallback_replicas": options.replicas},
                "max_backoff_s": _ASK_AGAIN,
            },
            logging_config=quiet,
            graceful_shutdown_timeout_s=60,
        )
        handle = serve.run(deployment.bind(options), name=_APP, route_prefix=None)
        yield Replicas(handle, port)
    except RuntimeError as error:
        if "failed" in str(error) or "unhealthy" in str(error):
            raise PainterGoneError(f"the replicas could not be started: {_first_line(error)}") from error
        raise
    finally:
        serve.shutdown()
        ray.shutdown()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port
