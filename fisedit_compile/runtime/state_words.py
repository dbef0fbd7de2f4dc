"""What distinguishes two states of a model, in the words in which a user changed it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fisedit_compile.utils.libraries import is_library

#: Clauses that a message holds at most; the rest is counted.
_MOST = 4

Values = Mapping[str, Any]


def differing_names(before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    """Names whose value is another one, or that only one of the two has."""
    return [name for name in {**before, **after} if _get(before, name) != _get(after, name)]


def differing_values(before: Values, after: Values) -> list[str]:
    """A clause for each change, such as ``"LoRA adapter 'snow': weight 0.5 -> 1.0"``."""
    paths = differing_names(before, after)
    clauses: dict[str, None] = {}
    for explain in (_freeu, _lora, _hooks, _processors, _code, _classes, _settings):
        explained = explain(paths, before, after)
        clauses.update(dict.fromkeys(clause for clause in explained.values() if clause))
        paths = [path for path in paths if path not in explained]
    words = list(clauses)
    return words[:_MOST] + ([f"{len(words) - _MOST} other settings"] if len(words) > _MOST else [])


def weights_in_words(names: list[str]) -> str:
    """``"weights of conv_in and 41 more"``."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    return f"weights of {_places(modules)}"


Explained = dict[str, str]  # path -> clause; empty where another path's clause says it


def _freeu(paths: list[str], before: Values, after: Values) -> Explained:
    mine = [path for path in paths if re.fullmatch(r"up_blocks\.\d+\.[sb][12]", path)]
    if not mine:
        return {}
    path = mine[0]
    if path not in before or path not in after:
        return dict.fromkeys(mine, f"FreeU: {_on(path in before)} -> {_on(path in after)}")
    return {path: f"FreeU: {path[-2:]} {before[path]} -> {after[path]}" for path in mine}


def _lora(paths: list[str], before: Values, after: Values) -> Explained:
    explained: Explained = {}
    layers = {path[: -len("._disable_adapters")] for path in (*before, *after) if path.endswith("._disable_adapters")}
    if not layers:
        return {}
    for path in paths:
        layer = next((each for each in _prefixes(path) if each in layers), None)
        if layer is None:
            continue
        rest = path[len(layer) :]
        explained[path] = ""
        both = path in before and path in after
        if not both and (match := re.fullmatch(r"\.lora_alpha\[('.*')\]", rest)):
            explained[path] = f"LoRA adapter {match[1]}: {'added' if path in after else 'removed'}"
        elif both and (match := re.fullmatch(r"\.scaling\[('.*')\]", rest)):
            old, new = (_lora_weight(each, layer, match[1]) for each in (before, after))
            explained[path] = f"LoRA adapter {match[1]}: weight {old} -> {new}"
        elif rest == "._disable_adapters" and both:
            explained[path] = f"LoRA adapters: {_on(not before[path])} -> {_on(not after[path])}"
        elif rest == "._active_adapter" and both:
            explained[path] = f"active LoRA adapters: {_listed(before[path])} -> {_listed(after[path])}"
        elif rest == ".merged_adapters" and both:
            for name in sorted({*before[path]} ^ {*after[path]}):
                explained[path] = f"LoRA adapter {name!r}: {'fused' if name in after[path] else 'no longer fused'}"
    if explained and not any(explained.values()):
        path = next(iter(explained))
        explained[path] = f"LoRA layers: {_change(path, path, before, after)}"
    return explained  # of layers that were wrapped or unwrapped, the adapters that came or went say it all


def _lora_weight(values: Values, layer: str, adapter: str) -> float:
    """The weight that a user gave: peft multiplies it by alpha over rank, or over the rank's root."""
    alpha, rank = values.get(f"{layer}.lora_alpha[{adapter}]"), values.get(f"{layer}.r[{adapter}]")
    scaling: float = values[f"{layer}.scaling[{adapter}]"]
    if not isinstance(alpha, (int, float)) or not isinstance(rank, (int, float)) or not alpha or not rank:
        return scaling
    root = values.get(f"{layer}.use_rslora[{adapter}]", False)
    return float(f"{scaling * (rank**0.5 if root else rank) / alpha:.6g}")


def _hooks(paths: list[str], before: Values, after: Values) -> Explained:
    explained: Explained = {}
    for path in paths:
        if match := re.match(r"(.*?)\.?(_forward_pre_hooks|_forward_hooks)\[\d+\]", path):
            hook = match[0]
            name = after.get(hook, before.get(hook))
            change = "added" if hook not in before else "removed" if hook not in after else "changed"
            explained[path] = f"hook {name} of {match[1] or 'the model'}: {change}"
    return explained


def _processors(paths: list[str], before: Values, after: Values) -> Explained:
    changes: dict[str, list[str]] = {}  # what changed -> the attention layers
    seen: set[tuple[str, str]] = set()
    explained: Explained = {}
    for path in paths:
        match = re.match(r"(.*)\.processor(?=[.:\[]|$)", path)
        if not match:
            continue
        explained[path] = ""
        where, rest = match[0], path[match.end() + 1 :]
        old, new = (str(each.get(f"{where}:class", each.get(where))).rpartition(".")[2] for each in (before, after))
        if old != new:
            change = f"{old} -> {new}"
        elif "IPAdapter" in new and rest.startswith("scale"):
            explained[path] = f"IP-Adapter scale: {_shown(before, path)} -> {_shown(after, path)}"
            continue
        else:  # of what a value of the processor holds itself, the value's first difference says it all
            attribute = re.split(r"[.:\[]", rest)[0]
            if (where, attribute) in seen:
                continue
            seen.add((where, attribute))
            change = _change(rest, path, before, after)
        if match[1] not in changes.setdefault(change, []):
            changes[change].append(match[1])
            explained[path] = change
    for path, change in explained.items():
        if change in changes:
            explained[path] = f"attention processor of {_places(changes[change])}: {change}"
    return explained


def _code(paths: list[str], before: Values, after: Values) -> Explained:
    """Methods of classes: exchanged in a library's class, or defined anew in a user's."""
    explained: Explained = {}
    for path in paths:
        if path.startswith("class "):
            name = path.removeprefix("class ").partition(":")[0]
            both = path in before and path in after
            explained[path] = f"{name}: changed" if both or is_library(name) else ""
    return explained


def _classes(paths: list[str], before: Values, after: Values) -> Explained:
    """Modules that came, went, or are of another class: named once, without what they hold."""
    changed = [path[: -len(":class")] for path in paths if path.endswith(":class")]
    tops = {each for each in changed if not any(other in changed for other in _prefixes(each) if other != each)}
    explained: Explained = {}
    for path in paths:
        top = next((each for each in _prefixes(path) if each in tops), None)
        if top is not None:
            explained[path] = _change(top, f"{top}:class", before, after) if path == f"{top}:class" else ""
    return explained


def _settings(paths: list[str], before: Values, after: Values) -> Explained:
    return {path: _change(path, path, before, after) for path in paths}


def _change(name: str, path: str, before: Values, after: Values) -> str:
    return f"{name}: {_shown(before, path)} -> {_shown(after, path)}"


def _shown(values: Values, path: str) -> str:
    return str(values[path])[:60] if path in values else "nothing"


def _prefixes(path: str) -> list[str]:
    """The path and all that lie above it."""
    ends = [match.start() for match in re.finditer(r"[.:\[]", path)]
    return [path, *(path[:end] for end in reversed(ends))]


def _places(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) if isinstance(names, tuple) else repr(names)


def _on(state: bool) -> str:
    return "on" if state else "off"


_MISSING = object()


def _get(values: Mapping[str, object], name: str) -> object:
    return values.get(name, _MISSING)
