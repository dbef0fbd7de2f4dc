"""Random operations on saved bases: record, edit, chain, save, load, evict, remove, damage, and killed processes.

    python benchmarks/base_soak.py --operations 1000

After each operation the store is held to what ought to lie in it: a base that is missing without having been removed,
or evicted for want of room, is lost. A base that is loaded is held, bit for bit, to what was recorded, and its edit to
the edit made when it was recorded: another one is wrong. Both have to be none, or the exit status is 1. Bases are kept
in every way that ``SparsityConfig(cache=...)`` knows, on a GPU in both tiers. The model has random weights and is very
small. Processes are killed on the CPU alone, since none can be forked from one that uses a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fisedit_compile.cache.read_base import open_base
from fisedit_compile.cache.remove_base import why_kept
from fisedit_compile.cache.store import BaseStore
from fisedit_compile.editing.base import Base
from fisedit_compile.editing.editor import Editor
from fisedit_compile.editing.result import Edit
from fisedit_compile.errors import BaseInUseError, BaseStorageError, DamagedBaseError

PROMPT, EDIT = "a cat on the left", "a dog on the left"

#: Bases that are kept in memory at most, and that the store has room for.
IN_MEMORY, IN_STORE = 4, 5


@dataclass
class Known:
    """What is known of a base since it was recorded: its editor, a digest of all that it holds, and one of its edit."""

    editor: Editor
    holds: str
    edit: str


@dataclass
class Soak:
    """Random operations on bases, in a folder of their own.

    Args:
        editors: make and edit the bases.
        arguments: of ``editor.generate``, beside prompt and generator.
        folder: where the store and single bases lie; empty.
        seed: of what is done.
        kills: whether processes are forked and killed.

    Attributes:
        done: how often each operation was done, and each refusal that it ought to bring about was met.
        faults: what was lost or wrong, in words.
    """

    editors: list[Editor]
    arguments: dict[str, Any]
    folder: Path
    seed: int
    kills: bool = True
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._memory: list[tuple[Base, Known]] = []
        self._stored: dict[str, Known] = {}  # the least recently used first
        room = 0
        for editor in self.editors:
            self._remember(editor, self._recorded(editor))
            room = max(room, IN_STORE * self._memory[-1][0].pack().nbytes)
        self._store = BaseStore(self.folder / "store", room)

    def run(self, operations: int) -> None:
        """Do so many operations."""
        always: list[Callable[[], None]] = [
            self._record,
            self._record_on_disk,
            self._chain,
            self._edit,
            *[self._save] * 4,
            self._save_alone,
            self._fill_disk,
        ]
        always += [self._kill] * 3 if self.kills else []
        of_stored: list[Callable[[], None]] = [*[self._load] * 2, self._evict, self._remove, self._damage, self._use]
        of_stored += [self._edit_half_read, self._let_go_half_read, self._damage_half_read, self._edit_on_disk]
        for _ in range(operations):
            operation = self._chance.choice([*always, *(of_stored if self._stored else [])])
            operation()
            self.done[operation.__name__.strip("_")] += 1
            self._check_store()

    def _record(self) -> None:
        editor = self._chance.choice(self.editors)
        self._remember(editor, self._recorded(editor))

    def _recorded(self, editor: Editor) -> Base:
        return self._generated(editor, self._chance.randrange(2**32))

    def _generated(self, editor: Editor, seed: int, folder: Path | None = None) -> Base:
        noise = torch.Generator().manual_seed(seed)
        return editor.generate(PROMPT, generator=noise, folder=folder, **self.arguments)

    def _record_on_disk(self) -> None:
        """The same picture twice: its base in memory, and on the disk."""
        editor, seed = self._chance.choice(self.editors), self._chance.randrange(2**32)
        folder = self.folder / "recorded"
        self._remember(editor, self._generated(editor, seed))
        self._hold(self._generated(editor, seed, folder), self._memory[-1][1], "recorded on the disk")
        shutil.rmtree(folder)

    def _chain(self) -> None:
        """The base of an edit, which later ones are made of."""
        base, known = self._chance.choice(self._memory)
        self._remember(known.editor, known.editor.base_of(self._edit_of(known.editor, base)))

    def _remember(self, editor: Editor, base: Base) -> None:
        known = Known(editor, digest_of_base(base), self._edited(editor, base))
        self._memory = [*self._memory, (base, known)][-IN_MEMORY:]

    def _edit(self) -> None:
        self._hold(*self._chance.choice(self._memory), "in memory")

    def _save(self) -> None:
        base, known = self._chance.choice(self._memory)
        going = self._going(base)
        name = self._store.put(base)
        self._expect_gone(going)
        self._stored[name] = known

    def _load(self) -> None:
        name = self._any()
        with self._store.get(name) as folder:
            self._hold(self._load_from(folder, name), self._stored[name], name)
        self._stored[name] = self._stored.pop(name)

    def _load_from(self, folder: Path, name: str) -> Base:
        return self._stored[name].editor.load(folder)

    def _edit_half_read(self) -> None:
        """The edit begins before the last call is in."""
        name = self._any()
        known, base = self._stored[name], self._load_from(self._store.folder / name, name)
        self.done["half read"] += not all(call.is_in for call in base.calls)
        if self._edited(known.editor, base) != known.edit:
            self.faults.append(f"wrong: the edit of {name}, half read, is another one")
        self._stored[name] = self._stored.pop(name)

    def _edit_on_disk(self) -> None:
        """The base stays on the disk, where nobody removes it as long as it is held."""
        name = self._any()
        known = self._stored[name]
        base = known.editor.load(self._store.folder / name, tier="disk")
        self._hold(base, known, name)
        try:
            self._store.remove(name)
            self.faults.append(f"lost: {name} was removed while it was in use")
        except BaseInUseError:
            self.done["refused: in use"] += 1
        self._stored[name] = self._stored.pop(name)

    def _let_go_half_read(self) -> None:
        """A base that nobody holds is read no further, and may be removed."""
        name = self._any()
        self._load_from(self._store.folder / name, name)
        self._stored[name] = self._stored.pop(name)
        until = time.monotonic() + 10
        while why := why_kept(self._store.folder / name):
            if time.monotonic() > until:
                self.faults.append(f"wrong: nobody reads {name}, and {why}")
                break
            time.sleep(0.001)

    def _damage_half_read(self) -> None:
        """A bit of a shard is flipped while the base is read: its edit is an error, or right."""
        name = self._any()
        known, base = self._stored[name], self._load_from(self._store.folder / name, name)
        self._flip(self._chance.choice(sorted((self._store.folder / name).glob("call-*.safetensors"))))
        try:
            if self._edited(known.editor, base) != known.edit:
                self.faults.append(f"wrong: the edit of {name}, damaged while it was read, is another one")
        except DamagedBaseError:
            self.done["refused: damaged while it was read"] += 1
        self._store.remove(name)
        del self._stored[name]

    def _save_alone(self) -> None:
        base, known = self._chance.choice(self._memory)
        folder = self.folder / "alone"
        base.save(folder)
        with open_base(folder) as opened:
            opened.verify()
        self._hold(known.editor.load(folder), known, "alone")
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()

    def _evict(self) -> None:
        most = self._chance.randrange(1, self._store.max_bytes)
        going = self._over(most)
        if (gone := self._store.evict(most)) != going:
            self.faults.append(f"lost: {gone} were evicted instead of {going}")
        self._expect_gone(going)

    def _remove(self) -> None:
        name = self._any()
        self._store.remove(name)
        del self._stored[name]

    def _use(self) -> None:
        """While a base is in use nothing removes it."""
        name = self._any()
        with self._store.get(name) as folder:
            for remove in (lambda: self._store.remove(name), lambda: self._store.evict(0)):
                try:
                    remove()
                    self.faults.append(f"lost: {name} was removed while it was in use")
                except BaseInUseError:
                    self.done["refused: in use"] += 1
            self._hold(self._load_from(folder, name), self._stored[name], name)
        self._stored[name] = self._stored.pop(name)

    def _damage(self) -> None:
        name = self._any()
        path = self._chance.choice(sorted((self._store.folder / name).glob("*.safetensors")))
        self._flip(path)
        try:
            self._load_from(self._store.folder / name, name).wait()
            self.faults.append(f"wrong: {name} was loaded with a flipped bit in {path.name}")
        except DamagedBaseError:
            self.done["refused: damaged"] += 1
        self._store.remove(name)
        del self._stored[name]

    def _flip(self, path: Path) -> None:
        """One bit of a file, where it lies."""
        with path.open("r+b") as file:
            place = self._chance.randrange(path.stat().st_size)
            file.seek(place)
            (old,) = file.read(1)
            file.seek(place)
            file.write(bytes([old ^ 1 << self._chance.randrange(8)]))

    def _fill_disk(self) -> None:
        base, known = self._chance.choice(self._memory)
        going, name = self._going(base), ""
        with failing_writes(self._chance.randrange(24)) as met:
            try:
                name = self._store.put(base)
            except BaseStorageError:
                self.done["refused: disk full"] += 1
        if bool(met) == bool(name):
            self.faults.append(f"wrong: {len(met)} writes failed, and the base was stored as {name!r}")
        self._expect_gone(going)
        if name:
            self._stored[name] = known

    def _kill(self) -> None:
        """Kill a process that saves, removes or evicts, at a random moment."""
        base, known = self._chance.choice(self._memory)
        name, old = f"killed-{self.done['kill']}", self._any()
        works: list[tuple[Callable[[], Any], list[str]]] = [(lambda: self._store.put(base, name), self._going(base))]
        if old:
            works += [(lambda: self._store.remove(old), [old]), (lambda: self._store.evict(1), list(self._stored))]
        work, going = self._chance.choice(works)
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        time.sleep(self._chance.uniform(0, 0.08))
        child.kill()
        child.join()
        self.done["killed"] += child.exitcode == -signal.SIGKILL
        if child.exitcode not in (0, -signal.SIGKILL):
            self.faults.append(f"wrong: a process ended with status {child.exitcode}")
        self.done["leftovers"] += sum(each.name.startswith(".") for each in self._store.folder.iterdir()) - 1
        self._store.evict()
        self._expect_gone(going, exactly=False)
        if name in {each.name for each in self._store.bases()}:
            self._stored[name] = known
            self.done["whole although killed"] += 1

    def _going(self, base: Base) -> list[str]:
        """Those that have to go for a base to be stored."""
        return self._over(self._store.max_bytes - base.pack().nbytes)

    def _over(self, most: int) -> list[str]:
        """Those that have to go, the least recently used first, until the others take ``most`` bytes."""
        sizes = {base.name: base.bytes for base in self._store.bases()}
        going: list[str] = []
        while sum(sizes.values()) > most:
            going.append(next(iter(sizes)))
            del sizes[going[-1]]
        return going

    def _expect_gone(self, going: list[str], *, exactly: bool = True) -> None:
        """Hold what is missing to what had to go: all of it, or as much as a killed process got done."""
        there = {base.name for base in self._store.bases()}
        gone = [name for name in self._stored if name not in there]
        if gone != going[: len(going) if exactly else len(gone)]:
            self.faults.append(f"lost: {gone} are missing, {going} had to go")
        for name in gone:
            del self._stored[name]
        self.done["gone"] += len(gone)

    def _check_store(self) -> None:
        bases = self._store.bases()
        names = [base.name for base in bases]
        if names != list(self._stored):
            self.faults.append(f"lost: the store holds {names}, and should hold {list(self._stored)}")
            self._stored = {name: self._stored[name] for name in names if name in self._stored}
        self.faults += [f"wrong: {base.problem}" for base in bases if base.problem]
        if (taken := sum(base.bytes for base in bases)) > self._store.max_bytes:
            self.faults.append(f"wrong: {taken} bytes in a store of {self._store.max_bytes}")
        if hidden := [path.name for path in self._store.folder.iterdir() if path.name.startswith(".")][1:]:
            self.faults.append(f"wrong: {hidden} were left")

    def _hold(self, base: Base, known: Known, name: str) -> None:
        if digest_of_base(base) != known.holds:
            self.faults.append(f"wrong: {name} does not hold what was recorded")
        if self._edited(known.editor, base) != known.edit:
            self.faults.append(f"wrong: the edit of {name} is another one")

    def _edited(self, editor: Editor, base: Base) -> str:
        edit = self._edit_of(editor, base)
        return digest_of([edit.latents]) + edit.image.tobytes().hex()[:64]

    def _edit_of(self, editor: Editor, base: Base) -> Edit:
        height, width = base.latents.shape[-2:]
        mask = torch.zeros(height, width, dtype=torch.bool)
        mask[: height // 2, : width // 2] = True
        words = EDIT if base.prompts[0] == PROMPT else PROMPT
        return editor.edit(base, words, mask)

    def _any(self) -> str:
        return self._chance.choice(list(self._stored)) if self._stored else ""


@contextmanager
def failing_writes(after: int) -> Iterator[list[int]]:
    """Within the context the disk is full, ``after`` some writes; gives a list of the writes that failed."""
    real, left, met = os.write, [after], []

    def write(*args: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            met.append(left[0])
            raise OSError(28, os.strerror(28))
        return real(*args)

    os.write = write  # type: ignore[assignment]
    try:
        yield met
    finally:
        os.write = real


def digest_of_base(base: Base) -> str:
    """A digest of every tensor and picture of a base, in order."""
    tensors = [*base.step_latents, *base.schedule.tables.values(), *(state for state, _ in base.generators)]
    tensors += [each for step in base.solver_steps for each in (step.prediction, step.latents)]
    tensors += [tensor for call in base.calls for tensor in call.cache.values()]
    pictures = "".join(picture.tobytes().hex() for picture in base.pictures)
    words = repr(
        (base.prompts, base.visits, base.config, [[entry.name for entry in call.cache] for call in base.calls])
    )
    return hashlib.sha256((digest_of(tensors) + pictures + words).encode()).hexdigest()


def digest_of(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--operations", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is done (default: 0)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="empty folder to work in (default: a temporary one)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    args = parser.parse_args()

    from fisedit_compile.bench.edit.random_pipeline import random_pipeline

    torch.set_num_threads(1)  # a fork has none of the threads
    cuda = args.device.type == "cuda"
    dtype = torch.float16 if cuda else torch.float32
    words = [PROMPT, EDIT]
    pipe = random_pipeline("tiny", size=128, words=words, scheduler="ddim", device=args.device, dtype=dtype)
    tiers = ("device", "host") if cuda else ("device",)
    editors = [
        Editor(pipe, {"dense_steps": 2, "cache": cache, "tier": tier})
        for cache in ("exact", "balanced", "small")
        for tier in tiers
    ]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        arguments = {"num_inference_steps": 4, "height": 128, "width": 128}
        soak = Soak(editors, arguments, args.folder or Path(temporary), args.seed, kills=not cuda)
        soak.run(args.operations)
    lost, wrong = (sum(fault.startswith(kind) for fault in soak.faults) for kind in ("lost", "wrong"))
    done = dict(sorted(soak.done.items()))
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"operations": args.operations, "lost": lost, "wrong": wrong, "done": done, "seconds": seconds}))
    if soak.faults:
        print("\n".join(soak.faults), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
