"""What can happen to bases on disk, as docs/bases.md lists it: a typed error each time, and the others still work."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.packed import forge, forge_content, packed_base
from support.pipelines import EDIT, left_half

from fisedit_compile import (
    Base,
    BaseFormatError,
    BaseInUseError,
    BaseStorageError,
    BaseVersionError,
    DamagedBaseError,
    Editor,
    FiseditError,
    SavedBaseError,
)
from fisedit_compile.cache.base_manifest import Manifest
from fisedit_compile.cache.read_base import open_base
from fisedit_compile.cache.remove_base import remove_base, remove_leftovers
from fisedit_compile.cache.write_base import write_base

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
SHARD = "call-0003.safetensors"


class Saved(NamedTuple):
    """Two saved bases: one that something happens to, and another one."""

    base: Path
    other: Path


@pytest.fixture(scope="module")
def saved_once(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_base.save(folder / "base")
    tiny_base.save(folder / "other")
    return folder


@pytest.fixture(scope="module")
def edited(tiny_editor: Editor, tiny_base: Base) -> Callable[[Path], bool]:
    """Whether a base in a folder loads and gives the edit of the one in memory."""
    want = tiny_editor.edit(tiny_base, EDIT, left_half()).latents

    def is_same(folder: Path) -> bool:
        return torch.equal(tiny_editor.edit(tiny_editor.load(folder), EDIT, left_half()).latents, want)

    return is_same


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path, edited: Callable[[Path], bool]) -> Iterator[Saved]:
    """Whatever a test does to the first, the second loads and gives its edit, and nothing half written is left."""
    shutil.copytree(saved_once, tmp_path / "bases")
    found = Saved(tmp_path / "bases" / "base", tmp_path / "bases" / "other")
    yield found
    assert edited(found.other)
    assert not [each.name for each in found.base.parent.iterdir() if each.name.startswith(".")]


class TestWriting:
    def test_disk_full_before_anything_is_written(
        self, saved: Saved, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(saved.base)._replace(free=2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        monkeypatch.setattr(os, "write", None)
        with pytest.raises(BaseStorageError, match=r"new: the base takes 3\.\d MiB, and 1\.0 MiB are free there"):
            tiny_base.save(saved.base.parent / "new")
        assert not (saved.base.parent / "new").exists()

    @pytest.mark.parametrize("call", ["mkdir", "open", "write", "fsync", "rename"])
    def test_disk_full_read_only_or_forbidden(
        self, saved: Saved, tiny_base: Base, call: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Any call of the file system may fail, at any time."""
        real, failed = getattr(os, call), []

        def failing(*args: Any, **kwargs: Any) -> Any:
            code = {"mkdir": errno.EROFS, "open": errno.EACCES}.get(call, errno.ENOSPC)
            if call != "open" or args[1] & os.O_CREAT:
                failed.append(code)
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, failing)
        words = r"new could not be written \((No space left on device|Read-only file system|Permission denied)\), and "
        with pytest.raises(
            BaseStorageError, match=words + "nothing is left of it: free space or check the permissions"
        ):
            tiny_base.save(saved.base.parent / "new")
        monkeypatch.undo()
        assert failed
        assert not (saved.base.parent / "new").exists()

    def test_the_kernel_refuses_to_write_more(self, saved: Saved, tiny_base: Base) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(BaseStorageError, match=r"new could not be written \(File too large\)"):
                tiny_base.save(saved.base.parent / "new")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not (saved.base.parent / "new").exists()

    def test_more_than_would_be_read_back(self, saved: Saved, tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fisedit_compile.cache.write_base.MOST_JSON", 1000)
        with pytest.raises(SavedBaseError, match=r"beside its tensors the base holds 0\.2 MiB, and 0\.0 are read back"):
            tiny_base.save(saved.base.parent / "new")
        assert not (saved.base.parent / "new").exists()

    def test_somebody_else_saves_under_the_same_name(
        self, saved: Saved, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.rename

        def raced(source: Any, target: Any) -> None:
            monkeypatch.undo()
            shutil.copytree(saved.base, target)
            real(source, target)

        monkeypatch.setattr(os, "rename", raced)
        with pytest.raises(SavedBaseError, match="new is there already: give another name"):
            tiny_base.save(saved.base.parent / "new")
        with open_base(saved.base.parent / "new") as opened:
            opened.verify()

    def test_the_writer_is_killed(self, tmp_path: Path) -> None:
        """At each of its calls of the file system, and at random moments; so is what removes a base."""
        script = ROOT / "tests" / "support" / "killed_writer.py"
        done = subprocess.run([sys.executable, script, tmp_path, "5", "0"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        counts = json.loads(done.stdout)
        assert counts["killed"] > 30
        assert counts["leftovers"] > 20
        assert counts["whole"] >= 4  # killed behind the renaming, or before it in a removal
        assert not any(tmp_path.iterdir())

    def test_what_is_being_written_is_no_leftover(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, found = os.rename, []

        def looked(*paths: Any) -> None:
            found.extend([remove_leftovers(tmp_path), sorted(each.name for each in tmp_path.iterdir())])
            real(*paths)

        monkeypatch.setattr(os, "rename", looked)
        write_base(packed_base(), tmp_path / "base")
        assert found[0] == []
        assert re.fullmatch(r"\.base\.[0-9a-f]{8}\.partial", *found[1])
        with open_base(tmp_path / "base") as opened:
            opened.verify()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def linked(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def piped(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swapped(path: Path) -> None:
    """The file of the same name and size of another base."""
    data = bytearray(path.read_bytes())
    data[-4:] = b"\0\0\0\0" if data[-4:] != b"\0\0\0\0" else b"\1\0\0\0"
    path.write_bytes(data)


DAMAGES = {
    "cut short": (cut, r"has \d+ bytes instead of \d+"),
    "emptied": (emptied, "has 0 bytes instead of"),
    "a bit flipped": (flipped, "is not what was written"),
    "removed": (Path.unlink, "is missing"),
    "a link": (linked, "is a symbolic link"),
    "a pipe": (piped, "is no regular file"),
    "of another base": (swapped, "is not what was written"),
}


class TestReading:
    @pytest.mark.parametrize("name", [SHARD, "base.safetensors", "decoder.safetensors", "base.json"])
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_damaged_file(self, saved: Saved, tiny_editor: Editor, name: str, damage: str) -> None:
        change, words = DAMAGES[damage]
        change(saved.base / name)
        message = rf"base: {re.escape(name)} {words}.*: remove the folder and generate the base again"
        with pytest.raises(DamagedBaseError, match=message):
            tiny_editor.load(saved.base).wait()
        with open_base(saved.base) as opened, pytest.raises(DamagedBaseError, match=message):
            opened.verify()
        remove_base(saved.base)
        assert not saved.base.exists()

    @pytest.mark.parametrize("damage", ["cut short", "emptied", "a bit flipped", "a link", "a pipe"])
    def test_a_damaged_manifest(self, saved: Saved, tiny_editor: Editor, damage: str) -> None:
        change, words = DAMAGES[damage]
        if damage == "cut short":  # the last character is a line feed
            change(saved.base / "manifest.json")
        change(saved.base / "manifest.json")
        message = words if damage in ("a link", "a pipe") else "manifest.json is damaged"
        with pytest.raises(DamagedBaseError, match=message):
            tiny_editor.load(saved.base)
        remove_base(saved.base)

    @pytest.mark.parametrize(
        ("old", "new"), [('"steps": 4', '"steps": 5'), ('"dense_steps": 2', '"dense_steps": 1'), ("cat", "dog")]
    )
    def test_a_manifest_that_says_something_else(self, saved: Saved, tiny_editor: Editor, old: str, new: str) -> None:
        path = saved.base / "manifest.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(DamagedBaseError, match=r"manifest\.json is damaged"):
            tiny_editor.load(saved.base)

    def test_any_bit_of_any_file(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("bits") / "base"
        write_base(packed_base(kib=4), folder)
        files = {path: path.read_bytes() for path in folder.iterdir()}
        with open_base(folder) as opened:
            whole = opened.manifest

        @given(st.sampled_from(sorted(files)), st.data())
        def flip(path: Path, data: Any) -> None:
            changed = bytearray(files[path])
            changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
            path.write_bytes(changed)
            try:
                with open_base(folder) as opened:
                    opened.verify()
                    assert opened.manifest == whole  # a space between values became a tabulator, say
            except SavedBaseError:
                pass
            finally:
                path.write_bytes(files[path])

        flip()

    def test_files_that_are_not_of_the_base(self, saved: Saved, edited: Callable[[Path], bool]) -> None:
        (saved.base / "note.txt").write_text("mine")
        assert edited(saved.base)
        with open_base(saved.base) as opened:
            assert opened.foreign_files() == ["note.txt"]
        with pytest.raises(BaseFormatError, match=r"base holds note\.txt beside a base: move that elsewhere first"):
            remove_base(saved.base)
        assert (saved.base / "note.txt").read_text() == "mine"
        assert edited(saved.base)

    @pytest.mark.parametrize(
        ("content", "error", "message"),
        [
            ('{"name": "an app"}', BaseFormatError, "base is no saved base: its manifest.json is of something else"),
            ("[1, 2]", BaseFormatError, "base is no saved base: its manifest.json is of something else"),
            ("[" * 100_000, DamagedBaseError, "manifest.json is damaged"),
            (
                '{"format": "fisedit_compile base"}',
                BaseVersionError,
                "base is of format None, this version reads format 5",
            ),
        ],
        ids=["another program's", "a list", "nested", "no version"],
    )
    def test_a_manifest_of_something_else(
        self, saved: Saved, tiny_editor: Editor, content: str, error: type[Exception], message: str
    ) -> None:
        (saved.base / "manifest.json").write_text(content)
        with pytest.raises(error, match=message):
            tiny_editor.load(saved.base)

    def test_another_format_version(self, saved: Saved, tiny_editor: Editor) -> None:
        path = saved.base / "manifest.json"
        path.write_text(path.read_text().replace('"format_version": 5', '"format_version": 1'))
        message = (
            r"base is of format 1, this version reads format 5: use the version that wrote it \(fisedit-compile .*, "
            r"torch .*\), or generate the base again"
        )
        with pytest.raises(BaseVersionError, match=message):
            tiny_editor.load(saved.base)

    def test_the_folder_itself_may_be_a_link(self, saved: Saved, edited: Callable[[Path], bool]) -> None:
        link = saved.base.parent / "link"
        link.symlink_to(saved.base)
        assert edited(link)
        with pytest.raises(BaseFormatError, match="link is no folder of a saved base"):
            remove_base(link)
        link.unlink()


def reference(content: Any) -> Any:
    """That of the first recorded tensor."""
    return next(entries for _, entries in content["calls"] if entries)[0][2]


FORGERIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file of an absurd size": (
        lambda base: forge(base, SHARD, (base / SHARD).read_bytes(), bytes=2**60),
        rf"{SHARD} has \d+ bytes instead of {2**60}",
    ),
    "a shard of absurd tensors": (
        lambda base: forge(base, SHARD, (2**60).to_bytes(8, "little") + b"{}"),
        rf"{SHARD} no safetensors",
    ),
    "a tensor of an absurd shape": (
        lambda base: forge(
            base,
            SHARD,
            len(
                header := b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'
            ).to_bytes(8, "little")
            + header,
        ),
        rf"{SHARD} no safetensors",
    ),
    "a tensor that is not there": (
        lambda base: forge_content(base, lambda content: reference(content).update(name="nothing")),
        r"base.json does not describe a base \('nothing'\)",
    ),
    "a shard that is not there": (
        lambda base: forge_content(base, lambda content: reference(content).update(shard="../other")),
        r"base.json does not describe a base \('../other'\)",
    ),
    "dimensions that it has not": (
        lambda base: forge_content(base, lambda content: reference(content).update(order=[10**12])),
        "base.json does not describe a base",
    ),
    "a device of no kind": (
        lambda base: forge_content(base, lambda content: reference(content).update(device="gpu of mine")),
        "base.json does not describe a base",
    ),
    "a kind of value that there is not": (
        lambda base: forge_content(base, lambda content: content.update(callback={"os.system": "true"})),
        r"base.json does not describe a base \(an unknown kind of value, 'os.system'\)",
    ),
    "less than a base": (
        lambda base: forge_content(base, lambda content: content.pop("visits")),
        r"base.json does not describe a base \('visits'\)",
    ),
    "nothing of its decoder": (
        lambda base: forge_content(base, lambda content: content.pop("decoded")),
        r"base.json does not describe a base \('decoded'\)",
    ),
    "no calls": (
        lambda base: forge_content(base, lambda content: content.pop("calls")),
        r"base.json does not describe a base \('calls'\)",
    ),
    "nothing": (lambda base: forge(base, "base.json", b"null"), "base.json does not describe a base"),
    "no JSON": (lambda base: forge(base, "base.json", b"\x80"), "base.json is no JSON"),
    "a file elsewhere": (
        lambda base: forge(base, SHARD, (base / SHARD).read_bytes(), name="../other/call-0003.safetensors"),
        "manifest.json is damaged",
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_base(saved: Saved, tiny_editor: Editor, forgery: str) -> None:
    """Checksums that fit do not make a base of it."""
    change, message = FORGERIES[forgery]
    change(saved.base)
    with pytest.raises(DamagedBaseError, match=message):
        tiny_editor.load(saved.base).wait()


def test_a_manifest_that_is_absurdly_large_itself(saved: Saved, tiny_editor: Editor) -> None:
    os.truncate(saved.base / "manifest.json", 2**40)  # a file of holes takes no room
    with pytest.raises(DamagedBaseError, match=rf"manifest.json has {2**40} bytes, more than a base's can have"):
        tiny_editor.load(saved.base)


class TestSharing:
    def test_a_base_in_use_is_not_removed(self, saved: Saved) -> None:
        with open_base(saved.base) as opened:
            with pytest.raises(BaseInUseError, match="base is in use: try again when that has ended"):
                remove_base(saved.base)
            opened.verify()
        remove_base(saved.base)

    def test_a_base_that_is_removed_while_it_is_opened(
        self, saved: Saved, tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.open

        def slow(path: Any, *args: Any, **kwargs: Any) -> int:
            descriptor = real(path, *args, **kwargs)
            if path == saved.base:
                monkeypatch.undo()
                remove_base(saved.base)
            return descriptor

        monkeypatch.setattr(os, "open", slow)
        with pytest.raises(BaseFormatError, match="base was removed just now"):
            tiny_editor.load(saved.base)

    def test_a_store_that_cannot_be_written_to_is_read(
        self, saved: Saved, edited: Callable[[Path], bool], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forbidden(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        for call in ("utime", "rename", "unlink", "rmdir", "mkdir"):
            monkeypatch.setattr(os, call, forbidden)
        assert edited(saved.base)
        with pytest.raises(BaseStorageError, match=r"base could not be removed \(Read-only file system\)"):
            remove_base(saved.base)
        monkeypatch.undo()
        assert edited(saved.base)


def test_all_of_them_are_errors_of_this_package() -> None:
    for kind in (BaseFormatError, BaseVersionError, DamagedBaseError, BaseInUseError, BaseStorageError):
        assert issubclass(kind, SavedBaseError)
        assert issubclass(kind, FiseditError)
    assert issubclass(BaseStorageError, OSError)


def test_a_manifest_says_the_same_when_it_is_read_again(saved: Saved) -> None:
    data = (saved.base / "manifest.json").read_bytes()
    assert Manifest.of_json(data, saved.base).to_json() == data


def test_each_row_of_the_table_in_the_docs_is_a_test() -> None:
    """The test is in this file, or in one of the others about bases on disk and memory."""
    page = (ROOT / "docs" / "bases.md").read_text()
    rows = [
        line.split(" | ")[-1].strip("` |") for line in page.splitlines() if line.count(" | ") == 2 and "`test_" in line
    ]
    files = ["cache/test_base_faults.py", "cache/test_store.py", "cache/test_reading.py", "editing/test_saved_base.py"]
    files += [
        f"editing/test_{name}.py" for name in ("half_read_base", "memory_estimate", "tiers", "disk_tier", "disk_record")
    ]
    files += ["serving/test_engine.py"]
    tests = "\n".join((ROOT / "tests" / file).read_text() for file in files)
    assert len(rows) > 40
    assert [row for row in rows if f"def {row}(" not in tests] == []
