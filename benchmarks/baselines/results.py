"""The rows of a table and the conditions they were measured under, in a JSON file that later runs extend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from baselines.measure import Row
from baselines.paper import PAPER_FIGURES, PaperFigures

#: Conditions that must be equal for rows to stand in one table.
_SAME = ("arch", "size", "steps", "attention", "compile", "guidance_scale", "device_name", "dtype")


class Results:
    """The rows by method; each row that is added is written to ``path``, if there is one.

    Args:
        path: the file. That of an earlier run is extended: its rows stay until they are measured again.
        conditions: what :func:`~table_a1.conditions_of` returns.
        order: the names of the methods, in the order of the table.

    Raises:
        ValueError: the folder of ``path`` does not exist, or there is a file that is no such table or was made under
            other conditions.
    """

    def __init__(self, path: Path | None, conditions: dict[str, Any], order: Sequence[str]) -> None:
        self._path, self._order = path, order
        self.conditions = conditions
        self._rows: dict[str, Row] = {}
        if path and not path.resolve().parent.is_dir():
            raise ValueError(f"--json {path}: there is no folder {path.resolve().parent}")
        if path and path.exists():
            self._extend(path)

    @property
    def rows(self) -> list[Row]:
        return [self._rows[name] for name in self._order if name in self._rows]

    def add(self, row: Row) -> None:
        """Put a row in the place of an earlier one, and write the file."""
        self._rows[row.name] = row
        if self._path:
            rows = [{**each.to_dict(), "paper": paper_of(each, self.conditions)._asdict()} for each in self.rows]
            part = self._path.with_name(f"{self._path.name}.part")  # a run cut off while it writes keeps the old file
            part.write_text(json.dumps({**self.conditions, "rows": rows}, indent=2) + "\n")
            part.replace(self._path)

    def _extend(self, path: Path) -> None:
        try:
            old = json.loads(path.read_text())
            rows = [{name: value for name, value in row.items() if name != "paper"} for row in old.pop("rows")]
            self._rows = {row["name"]: Row.from_dict(row) for row in rows}
            commands, masks, versions = [*old["commands"]], old["masks"], {**old["versions"]}
            differences = _differences(old, self.conditions)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--json {path}: a file is there that is no table of this program: {error!r}") from error
        if differences:
            raise ValueError(
                f"--json {path} holds figures under other conditions ({'; '.join(differences)}): name another file"
            )
        self.conditions["commands"] = [*commands, *self.conditions["commands"]]
        self.conditions["masks"] = self.conditions["masks"] or masks
        self.conditions["versions"] = {**versions, **self.conditions["versions"]}


def paper_of(row: Row, conditions: dict[str, Any]) -> PaperFigures:
    """The paper's figures for a row; empty if the row was measured at another size than the paper's."""
    same = (conditions["arch"], conditions["size"], conditions["steps"]) == ("sd2", 768, 50)
    return PAPER_FIGURES.get(row.name, PaperFigures()) if same else PaperFigures()


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The conditions that differ, so that the rows of two runs cannot stand in one table; empty if they can."""
    names = [*_SAME, *(["threads"] if new["device"] == "cpu" else [])]
    differ = [f"{name} {old[name]}, now {new[name]}" for name in names if old[name] != new[name]]
    if "meta" in (old["device"], new["device"]) and old["device"] != new["device"]:
        differ.append(f"device {old['device']}, now {new['device']}")
    for package, version in new["versions"].items():
        if old["versions"].get(package, version) != version:  # a package that was not installed then was not used
            differ.append(f"{package} {old['versions'][package]}, now {version}")
    return differ
