"""How long layers take on a device, from a short measurement: the cost model behind ``blocks="measured"``.

Each distinct layer is timed at a few counts of rows. Two models are fitted, and the one that predicts left out points
better is used:

- ``interpolated``: between the measured points, straight in the logarithms of rows and time;
- ``roofline``: ``launch + max(MACs / rate, bytes / bandwidth)`` with three constants for the whole device.

The roofline also carries on beyond the points, and stands in for a layer that was not measured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from fisedit_compile.cost_model.layer_timer import LayerTimer, Timer, device_name
from fisedit_compile.cost_model.row_layers import LayerShape, RowLayer

logger = logging.getLogger(__name__)

Model = Literal["interpolated", "roofline"]

#: Counts of rows at which a layer is timed, as shares of all pixels of its resolution.
SHARES = (1 / 64, 1 / 20, 1 / 8, 1 / 4, 1 / 2, 1.0)
_FEWEST = 16

#: On a CPU a point of more multiply-accumulates is left out, unless it is a layer's first.
CPU_MACS = 1e8

#: Rows and channels of the gather whose bandwidth is that of fetching halo rows.
_FETCH = (4096, 640)

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Roofline:
    """``launch + max(MACs / rate, bytes / bandwidth)``: microseconds, MACs and bytes a microsecond."""

    launch: float
    rate: float
    bandwidth: float

    def at(self, shape: LayerShape, rows: int, itemsize: int) -> float:
        """Microseconds of a layer."""
        return self.launch + max(shape.macs(rows) / self.rate, shape.bytes(rows, itemsize) / self.bandwidth)


@dataclass(frozen=True)
class Calibration:
    """What was measured on one device, and what it predicts. Made by :func:`calibrate`.

    Attributes:
        device, dtype, torch_version: that it holds for, and for no others.
        points: of each layer, (rows, microseconds) in the order of rows.
        fetch_bandwidth: bytes a microsecond, read and written, at which halo rows are gathered.
    """

    device: str
    dtype: str
    torch_version: str
    points: Mapping[LayerShape, Points]
    fetch_bandwidth: float

    @cached_property
    def roofline(self) -> Roofline:
        """Fitted to all points."""
        return _fit(_samples(self.points), self.itemsize)

    @cached_property
    def held_out(self) -> dict[str, float]:
        """Mean relative error of each model at points that it was not given; empty where no layer has three."""
        errors: dict[str, list[float]] = {"interpolated": [], "roofline": []}
        for position in range(1, max(map(len, self.points.values()), default=0) - 1):
            left_out = {shape: p[position] for shape, p in self.points.items() if position < len(p) - 1}
            rest = {s: (*p[:position], *p[position + 1 :]) if s in left_out else p for s, p in self.points.items()}
            roofline = _fit(_samples(rest), self.itemsize)
            for shape, (rows, measured) in left_out.items():
                errors["interpolated"].append(abs(_between(rest[shape], rows) / measured - 1))
                errors["roofline"].append(abs(roofline.at(shape, rows, self.itemsize) / measured - 1))
        return {name: float(np.mean(values)) for name, values in errors.items() if values}

    @cached_property
    def model(self) -> Model:
        """The model that predicts left out points better."""
        errors = self.held_out
        return "roofline" if errors and errors["roofline"] < errors["interpolated"] else "interpolated"

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return int(getattr(torch, self.dtype).itemsize)

    def microseconds(self, shape: LayerShape, rows: int) -> float:
        """The predicted time of a layer at a number of rows; 0 for none."""
        if rows == 0:
            return 0.0
        points = self.points.get(shape, ())
        if not points or self.model == "roofline":
            return self.roofline.at(shape, rows, self.itemsize)
        if rows <= points[-1][0]:
            return _between(points, rows)
        last_rows, last = points[-1]
        grown = self.roofline.at(shape, rows, self.itemsize) / self.roofline.at(shape, last_rows, self.itemsize)
        return last * max(grown, 1.0)

    def fetch_microseconds(self, channels: int, rows: int) -> float:
        """The predicted time to gather halo rows."""
        return 2 * rows * channels * self.itemsize / self.fetch_bandwidth

    def to_dict(self) -> dict[str, Any]:
        """As JSON; :meth:`from_dict` reads it. Models and errors are there to be read by people."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "torch_version": self.torch_version,
            "fetch_bandwidth": self.fetch_bandwidth,
            "points": [{**asdict(s), "points": [list(p) for p in points]} for s, points in self.points.items()],
            "model": self.model,
            "held_out": self.held_out,
            "roofline": asdict(self.roofline),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """The calibration of :meth:`to_dict`.

        Raises:
            ValueError: not such a dict.
        """
        try:
            points = {
                LayerShape(**{name: value for name, value in each.items() if name != "points"}): tuple(
                    (int(rows), float(microseconds)) for rows, microseconds in each["points"]
                )
                for each in data["points"]
            }
            return cls(data["device"], data["dtype"], data["torch_version"], points, float(data["fetch_bandwidth"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no calibration ({error!r}): give what Calibration.to_dict wrote") from error


_of_process: dict[tuple[str, str, str], Calibration] = {}


def calibrate(
    layers: Collection[RowLayer], device: torch.device, dtype: torch.dtype, *, timer: Timer | None = None
) -> Calibration:
    """Measure the layers that this process has not measured on this device yet: a second or two on a GPU.

    The first time on a machine compiling the kernels takes longer than that.

    Args:
        layers: of a program, see :func:`~fisedit_compile.cost_model.row_layers.row_layers`.
        device: where they run.
        dtype: of values and weights.
        timer: what measures, in place of the device; nothing is kept for the process then.

    Raises:
        ValueError: a device without time, such as meta.
    """
    if device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"blocks='measured' times layers on the device of the U-Net, and {device.type!r} is none that computes: "
            "choose 'pixel' or 'paper'"
        )
    key = (device_name(device), str(dtype).removeprefix("torch."), torch.__version__)
    known = _of_process.get(key) if timer is None else None
    most: dict[LayerShape, int] = {}
    for layer in layers:
        if known is None or layer.shape not in known.points:
            most[layer.shape] = max(most.get(layer.shape, 0), layer.most)
    if known is not None and not most:
        return known
    start = time.perf_counter()
    measuring = timer or LayerTimer(device, dtype)
    largest = CPU_MACS if device.type == "cpu" and timer is None else float("inf")
    points = {
        shape: tuple((rows, measuring.layer(shape, rows)) for rows in _counts(shape, pixels, largest))
        for shape, pixels in most.items()
    }
    if known is None:
        rows, channels = _FETCH
        bandwidth = 2 * rows * channels * dtype.itemsize / measuring.fetch(channels, rows)
        result = Calibration(*key, points, bandwidth)
    else:
        result = replace(known, points={**known.points, **points})
    errors = ", ".join(f"{name} {error:.0%}" for name, error in result.held_out.items())
    logger.info(
        "timed %d layers on %s in %.1f s: %s (error at points left out: %s)",
        len(points), key[0], time.perf_counter() - start, result.model, errors or "unknown",
    )  # fmt: skip
    if timer is None:
        _of_process[key] = result
    return result


def _counts(shape: LayerShape, pixels: int, largest: float) -> Iterator[int]:
    """Counts of rows at which to time a layer, each once; at least one."""
    counts = sorted({min(max(round(share * pixels), _FEWEST), pixels) for share in SHARES})
    yield counts[0]
    yield from (rows for rows in counts[1:] if shape.macs(rows) <= largest)


def _between(points: Points, rows: int) -> float:
    """Straight between points in the logarithms; below the first, on with its slope, but never up."""
    x, y = np.log(np.array(points).T)
    at = float(np.log(rows))
    if at < x[0] and len(x) > 1:
        slope = min(max((y[1] - y[0]) / (x[1] - x[0]), 0.0), 1.0)
        return float(np.exp(y[0] + slope * (at - x[0])))
    return float(np.exp(np.interp(at, x, y)))


def _samples(points: Mapping[LayerShape, Points]) -> list[tuple[LayerShape, int, float]]:
    return [(shape, rows, time) for shape, each in points.items() for rows, time in each]


def _fit(samples: Sequence[tuple[LayerShape, int, float]], itemsize: int) -> Roofline:
    """Least mean relative error, by turns of growing and shrinking each constant."""
    macs, moved, times = np.array(
        [(shape.macs(rows), shape.bytes(rows, itemsize), time) for shape, rows, time in samples]
    ).T

    def error(constants: np.ndarray) -> float:
        launch, rate, bandwidth = constants
        return float(np.mean(np.abs((launch + np.maximum(macs / rate, moved / bandwidth)) / times - 1)))

    # Nothing is slower than its launch, and nothing faster than what was reached.
    best = np.array([times.min() / 2, (macs / times).max(), (moved / times).max()])
    least, step = error(best), 2.0
    while step > 1.01:
        moves = [best * np.where(np.arange(3) == i, factor, 1.0) for i in range(3) for factor in (step, 1 / step)]
        errors = [error(each) for each in moves]
        if min(errors) < least:
            best, least = moves[int(np.argmin(errors))], min(errors)
        else:
            step = step**0.5
    return Roofline(*map(float, best))
