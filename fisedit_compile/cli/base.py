"""``fisedit-compile base``: save the base of a picture, and look after bases that were saved."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fisedit_compile.cache.base_manifest import Manifest
from fisedit_compile.cache.read_base import open_base
from fisedit_compile.cache.remove_base import remove_base, remove_leftovers
from fisedit_compile.cache.store import BaseStore, stored_bases
from fisedit_compile.cli.base_options import add_base_options, make_base, settle_base_options
from fisedit_compile.cli.pipelines import add_model_option, open_pipeline
from fisedit_compile.cli.runtime import add_runtime_options, finite, start
from fisedit_compile.errors import BaseFormatError


def add_parser(subparsers: Any) -> None:
    """Add the subcommand."""
    base: argparse.ArgumentParser = subparsers.add_parser(
        "base", help="save the base of a picture, and look after saved bases"
    )
    what = base.add_subparsers(metavar="WHAT", required=True)
    save = what.add_parser("save", help="generate a picture and save its base", description=_save.__doc__)
    save.add_argument("folder", type=Path, metavar="DIR", help="where the base will lie: not there yet, or empty")
    add_model_option(save)
    save.add_argument("--prompt", metavar="WORDS", help="of the picture")
    add_base_options(save)
    add_runtime_options(save)
    save.set_defaults(run=_save)

    show = what.add_parser("show", help="what a base is of", description=_show.__doc__)
    show.add_argument("folder", type=Path, metavar="DIR", help="of a base")
    show.add_argument("--json", action="store_true", help="print the manifest instead")
    show.set_defaults(run=_show)

    verify = what.add_parser("verify", help="read all files of bases", description=_verify.__doc__)
    verify.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="of a base")
    verify.set_defaults(run=_verify)

    list_ = what.add_parser("list", help="the bases in a folder", description=_list.__doc__)
    list_.add_argument("folder", type=Path, metavar="DIR", help="in which bases lie")
    list_.set_defaults(run=_list)

    remove = what.add_parser("remove", help="remove bases", description=_remove.__doc__)
    remove.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="of a base")
    remove.set_defaults(run=_remove)

    prune = what.add_parser("prune", help="remove bases that were not used for longest", description=_prune.__doc__)
    prune.add_argument("folder", type=Path, metavar="DIR", help="in which bases lie")
    prune.add_argument(
        "--max-gib", type=_gib, metavar="X", help="what bases may take together (default: no limit, only leftovers go)"
    )
    prune.set_defaults(run=_prune)


def _save(args: argparse.Namespace) -> None:
    """Generate a picture, or take a photo, and save its base, for `fisedit-compile edit --base` and `Editor.load`."""
    from fisedit_compile.cache.write_base import check_target

    config = settle_base_options(args)
    check_target(args.folder)
    device, dtype = start(args)

    from fisedit_compile.editing.editor import Editor

    pipe = open_pipeline(args.model, args.scheduler, device, dtype)
    make_base(Editor(pipe, config), args).save(args.folder)
    with open_base(args.folder) as opened:
        print(_described(args.folder, opened.manifest))


def _show(args: argparse.Namespace) -> None:
    """Print what a base is of; its shards are not read."""
    with open_base(args.folder) as opened:
        manifest, foreign = opened.manifest, opened.foreign_files()
    if args.json:
        print(json.dumps(json.loads(manifest.to_json()), indent=2))
        return
    print(_described(args.folder, manifest))
    if foreign:
        print(f"beside it, neither read nor removed: {', '.join(foreign)}")


def _verify(args: argparse.Namespace) -> None:
    """Read all files of bases, and hold them to their checksums; the first that is damaged is an error."""
    for folder in args.folders:
        with open_base(folder) as opened:
            opened.verify()
            print(f"{folder}: {len(opened.manifest.files)} files, {_mib(opened.manifest.nbytes)}, intact")


def _list(args: argparse.Namespace) -> None:
    """List the bases in a folder, those first that were not used for longest."""
    rows = [
        [
            base.name,
            f"{base.used.astimezone():%Y-%m-%d %H:%M}",
            _mib(base.bytes),
            base.problem or "; ".join(base.manifest.summary["prompts"] if base.manifest else []),
        ]
        for base in stored_bases(args.folder)
    ]
    print(tabulate(rows, ["base", "used", "size", "prompt"], tablefmt="plain", disable_numparse=True))


def _remove(args: argparse.Namespace) -> None:
    """Remove bases, damaged ones, too; folders that hold anything else are left alone."""
    for folder in args.folders:
        remove_base(folder)
        print(f"removed {folder}")


def _prune(args: argparse.Namespace) -> None:
    """Remove what killed processes left in a folder of bases, and bases, those first that were not used for longest."""
    if not args.folder.is_dir():
        raise BaseFormatError(f"{args.folder} is no folder: give one in which bases lie")
    gone = remove_leftovers(args.folder)
    if args.max_gib is not None:
        gone += BaseStore(args.folder, 1).evict(int(args.max_gib * 2**30))
    print("\n".join(f"removed {args.folder / name}" for name in gone) or "nothing to remove")


def _described(folder: Path, manifest: Manifest) -> str:
    summary = manifest.summary
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    config = ", ".join(f"{name}={value}" for name, value in summary["config"].items())
    rows = [
        ["base", folder],
        *(["prompt", prompt] for prompt in summary["prompts"]),
        ["pipeline", f"{summary['pipeline']}, {summary['scheduler']}, U-Net {summary['unet']}"],
        ["steps", f"{summary['steps']}, of which an edit visits {summary['visited_steps']}"],
        ["latents", f"{'x'.join(map(str, summary['latents']))} {summary['dtype']} on {summary['device']}"],
        ["config", config],
        ["size", f"{_mib(manifest.nbytes)} in {len(manifest.files)} files"],
        ["saved", f"{manifest.saved} by {versions}"],
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _gib(text: str) -> float:
    value = finite(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is less than nothing")
    return value
