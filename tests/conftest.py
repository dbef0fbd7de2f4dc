"""What tests share: threads, the hypothesis profile, the ``gpu`` marker, U-Nets that are captured once a session."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from support.deprecations import own_calls_raise
from support.pipelines import CONFIG, generate, tiny_pipeline
from support.unets import UNets

from fisedit_compile import Base, Editor

torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 is respected
gc.set_threshold(*gc.get_threshold()[:2], 100)  # all objects are searched a tenth as often: a fortieth of the time

# Without the phase "explain": it runs a failing U-Net hundreds of times more to say which values do not matter.
_PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.target, Phase.shrink)
settings.register_profile(
    "ci", max_examples=15, deadline=None, phases=_PHASES, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("ci"), max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


#: Files that take longest, the longest first: so that of several workers none is left with one while the others wait.
_LONGEST = (
    "serving/test_cluster.py",
    "test_invariants.py",
    "test_changed_models_backend.py",
    "bench/test_paper_figures.py",
    "editing/test_edit_many.py",
    "test_changed_models.py",
    "test_readme.py",
    "editing/test_edit_many_kinds.py",
    "macs/test_macs.py",
    "quality/test_quality_command.py",
    "bench/test_table_a1.py",
    "test_backend.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Graphs that tests export are found by later tests of the same run, in whatever process, and by no other run."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="fisedit-graphs-")
        os.environ["FISEDIT_COMPILE_CACHE"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device: torch.cuda.is_available() is False"))


@pytest.fixture(scope="module", autouse=True)
def older_objects_are_not_searched() -> None:
    """Searches for garbage pass over what was imported, collected and left by earlier files.

    With all of it, each takes seconds at last: what a test wants to be freed it searches for itself, as editors do that
    are freed, and Python goes through all objects now and then.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    with own_calls_raise():
        return (yield)


@pytest.fixture(scope="session")
def unets() -> UNets:
    return UNets()


@pytest.fixture(scope="session")
def tiny_editor() -> Editor:
    """An editor of one small pipeline, captured once, for all tests that leave it as they found it."""
    return Editor(tiny_pipeline(sparse_decoder=True), CONFIG)


@pytest.fixture(scope="session")
def tiny_base(tiny_editor: Editor) -> Base:
    """Drawn by one thread, as the tests are that compare bits with it, whichever of them asks first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return generate(tiny_editor)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def tiny_pipe(tiny_editor: Editor) -> Any:
    """The pipeline of ``tiny_editor``."""
    return tiny_editor.pipe


@pytest.fixture(scope="session")
def tiny_editor_with(tiny_editor: Editor) -> Callable[..., Editor]:
    """Editors of the pipeline of ``tiny_editor``, by what their configs change, for tests that leave them as they are.

    Each is captured once.
    """

    @cache
    def made(**changes: Any) -> Editor:
        return Editor(tiny_editor.pipe, {**CONFIG, **changes})

    return made


@pytest.fixture(scope="session")
def own_pipeline(tiny_editor: Editor) -> Callable[..., Any]:
    """Makes pipelines for one test each, which may change all but the U-Net: that of ``tiny_editor``, captured before.

    It is sparse already, so that an editor of such a pipeline has the config of ``tiny_editor``.
    """
    return partial(tiny_pipeline, unet=tiny_editor.unet)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For modules of tiny inputs: with two threads they took 254 s, with one 130 s, on two cores with other work.

    Of module scope, because Dynamo guards on the number of threads: what a class compiled would compile again.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def ieee_fp32() -> Iterator[None]:
    """cuDNN runs fp32 convolutions in TF32 by default; the row kernels follow the flag of matrix products."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
