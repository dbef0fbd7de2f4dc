"""Figure A3, a row a case and a column a method, and a static page with all pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from fisedit_compile.editing.overview import side_by_side, stacked
from fisedit_compile.quality.cases import Case
from tradeoffs.curves import Setting
from tradeoffs.workers import BASE, DENSE, RENDERED, picture_file

_STYLE = """\
body { font: 14px sans-serif; margin: 2em; } td, th { padding: 4px; vertical-align: top; text-align: left; }
td img { width: 160px; } pre { background: #f4f4f4; padding: 1em; overflow-x: auto; } .plot { max-width: 100%; }
tr.case td { border-top: 1px solid #aaa; padding-top: 10px; }"""

GRID, PLOT = "A3.png", "A2.png"


def draw_grid(folder: Path, cases: Sequence[Case], settings: Sequence[Setting]) -> Image.Image:
    """Figure A3 from the pictures of a page, which must be there for the base; others stay empty."""
    sheets = []
    for case in cases:
        base = Image.open(picture_file(folder, case.id, BASE))
        panels = [(base, f"Base: {case.prompt}")]
        for number, setting in enumerate(settings):
            file = picture_file(folder, case.id, setting.name)
            picture = Image.open(file) if file.exists() else Image.new("RGB", base.size, "white")
            panels.append((picture, f"{setting.title}" + (f": {case.edit}" if number == len(settings) - 1 else "")))
        sheets.append(side_by_side(panels))
    return stacked(sheets)


def write_page(
    folder: Path,
    cases: Sequence[Case],
    settings: Sequence[Setting],
    failed: Mapping[str, Mapping[str, str]],
    *,
    text: str,
) -> Path:
    """Write ``index.html`` over the pictures that lie in the folder; its path.

    Args:
        folder: of the page.
        cases, settings: rows and columns.
        failed: id of a case -> name of a setting -> why it has no picture.
        text: the summary.
    """
    names = {BASE: "base", DENSE: "dense edit", RENDERED: "rendered", **{each.name: each.title for each in settings}}
    rows = []
    for case in cases:
        cells = []
        for name in names:
            if picture_file(folder, case.id, name).exists():
                source = escape(str(picture_file(folder, case.id, name).relative_to(folder)))
                cells.append(f'<td><img loading="lazy" src="{source}" alt="{escape(name)}"></td>')
            else:
                cells.append(f"<td>{escape(failed.get(case.id, {}).get(name, 'none'))}</td>")
        head = f"<b>{escape(case.id)}</b>: {escape(case.prompt)} &rarr; {escape(case.edit)}"
        rows.append(f'<tr class="case"><td colspan="{len(names)}">{head}</td></tr>\n<tr>{"".join(cells)}</tr>')
    heads = "".join(f"<th>{escape(title)}</th>" for title in names.values())
    page = folder / "index.html"
    page.write_text(
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Figures A2 and A3</title>\n'
        f"<style>\n{_STYLE}\n</style>\n<h1>Figures A2 and A3</h1>\n<pre>{escape(text)}</pre>\n"
        f'<p><img class="plot" src="{PLOT}" alt="figure A2"></p>\n<p><a href="{GRID}">figure A3</a></p>\n'
        f"<table>\n<tr>{heads}</tr>\n" + "\n".join(rows) + "\n</table>\n</html>\n"
    )
    return page
