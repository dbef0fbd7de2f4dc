"""Predicts how long layers take on a device from a short measurement there: the model behind ``blocks="measured"``.

Each distinct layer is timed at a few numbers of rows; a pair of rows and microseconds is a *point*. Two models are
fitted to the points, and the one that better predicts points left out of the fit is used:

- ``interpolated``: a line from point to point, straight in the logarithms of rows and time;
- ``roofline``: ``launch + max(MACs / rate, bytes / bandwidth)`` with three constants for the whole device.

Beyond the last point of a layer, and for a layer that was not timed, the roofline predicts in either case.
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

#: Numbers of rows at which a layer is timed, as shares of all pixels of its resolution, and the fewest rows timed.
TIMED_SHARES = (1 / 64, 1 / 20, 1 / 8, 1 / 4, 1 / 2, 1.0)
_FEWEST_TIMED_ROWS = 16

#: On a CPU no point takes more multiply-accumulates than this, except a layer's first.
CPU_MACS = 1e8

#: Size of the gather that is timed to get the bandwidth of fetching halo rows.
_GATHERED_ROWS, _GATHERED_CHANNELS = 4096, 640

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Roofline:
    """Predicts ``launch + max(MACs / rate, bytes / bandwidth)`` microseconds.

    Attributes:
        launch: microseconds of any layer, however small.
        rate: multiply-accumulates a microsecond.
        bandwidth: bytes moved a microsecond.
    """

    launch: float
    rate: float
    bandwidth: float

    def at(self, shape: LayerShape, rows: int, itemsize: int) -> float:
        """The microseconds of a layer at ``rows`` output rows, with values of ``itemsize`` bytes."""
        return self.launch + max(shape.macs(rows) / self.rate, shape.bytes(rows, itemsize) / self.bandwidth)


@dataclass(frozen=True)
class Calibration:
    """What was measured on one device, and what it predicts. Made by :func:`calibrate`.

    Attributes:
        device, dtype, torch_version: what was measured, and what alone the predictions hold for.
        points: for each layer its points (rows, microseconds), in the order of rows.
        fetch_bandwidth: bytes a microsecond, read and written together, at which halo rows are gathered.
    """

    device: str
    dtype: str
    torch_version: str
    points: Mapping[LayerShape, Points]
    fetch_bandwidth: float

    @cached_property
    def roofline(self) -> Roofline:
        """The roofline fitted to the points of all layers."""
        return _fit(_samples(self.points), self.itemsize)

    @cached_property
    def held_out(self) -> dict[str, float]:
        """The mean relative error of each model at points left out of its fit; empty if no layer has three points."""
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
        """The model that better predicts points left out of its fit."""
        errors = self.held_out
        return "roofline" if errors and errors["roofline"] < errors["interpolated"] else "interpolated"

    @property
    def itemsize(self) -> int:
        """Bytes of one value of ``dtype``."""
        return int(getattr(torch, self.dtype).itemsize)

    def microseconds(self, shape: LayerShape, rows: int) -> float:
        """The predicted microseconds of a layer at ``rows`` output rows; 0 for no rows."""
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
        """The predicted microseconds of gathering ``rows`` halo rows of ``channels`` channels."""
        return 2 * rows * channels * self.itemsize / self.fetch_bandwidth

    def to_dict(self) -> dict[str, Any]:
        """The calibration as plain values for JSON, which :meth:`from_dict` reads; model and errors are for people."""
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
        """The calibration that :meth:`to_dict` wrote.

        Raises:
            ValueError: ``data`` is not what :meth:`to_dict` writes.
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


#: The calibrations that this process has made, by device name, dtype and version of torch.
_calibrations: dict[tuple[str, str, str], Calibration] = {}


def calibrate(
    layers: Collection[RowLayer], device: torch.device, dtype: torch.dtype, *, timer: Timer | None = None
) -> Calibration:
    """Time those layers that this process has not timed on this device yet, and return all that it knows of the device.

    This takes a second or two on a GPU; the first time on a machine also the seconds of compiling the kernels.

    Args:
        layers: the layers of a U-Net, see :func:`~fisedit_compile.cost_model.row_layers.row_layers`.
        device: where they run.
        dtype: the dtype of values and weights.
        timer: takes the times instead of a :class:`LayerTimer`; its results are not kept for later calls.

    Raises:
        ValueError: a device that computes nothing, such as meta.
    """
    if device.type not in ("cuda", "cpu"):
        raise ValueError(
            f"blocks='measured' times layers on the device of the U-Net, and {device.type!r} is none that computes: "
            "choose 'pixel' or 'paper'"
        )
    key = (device_name(device), str(dtype).removeprefix("torch."), torch.__version__)
    known = _calibrations.get(key) if timer is None else None
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
        moved = 2 * _GATHERED_ROWS * _GATHERED_CHANNELS * dtype.itemsize
        bandwidth = moved / measuring.fetch(_GATHERED_CHANNELS, _GATHERED_ROWS)
        result = Calibration(*key, points, bandwidth)
    else:
        result = replace(known, points={**known.points, **points})
    errors = ", ".join(f"{name} {error:.0%}" for name, error in result.held_out.items())
    logger.info(
        "timed %d layers on %s in %.1f s: %s (error at points left out: %s)",
        len(points), key[0], time.perf_counter() - start, result.model, errors or "unknown",
    )  # fmt: skip
    if timer is None:
        _calibrations[key] = result
    return result


def _counts(shape: LayerShape, pixels: int, largest: float) -> Iterator[int]:
    """The numbers of rows at which to time a layer of a resolution of ``pixels``, each once; at least one number."""
    counts = sorted({min(max(round(share * pixels), _FEWEST_TIMED_ROWS), pixels) for share in TIMED_SHARES})
    yield counts[0]
    yield from (rows for rows in counts[1:] if shape.macs(rows) <= largest)


def _between(points: Points, rows: int) -> float:
    """The interpolated microseconds at ``rows``, on straight lines between the logarithms of the points.

    Below the first point the first line goes on, with a slope held to 0 to 1 so that fewer rows never take longer.
    """
    x, y = np.log(np.array(points).T)
    at = float(np.log(rows))
    if at < x[0] and len(x) > 1:
        slope = min(max((y[1] - y[0]) / (x[1] - x[0]), 0.0), 1.0)
        return float(np.exp(y[0] + slope * (at - x[0])))
    return float(np.exp(np.interp(at, x, y)))


def _samples(points: Mapping[LayerShape, Points]) -> list[tuple[LayerShape, int, float]]:
    return [(shape, rows, time) for shape, each in points.items() for rows, time in each]


def _fit(samples: Sequence[tuple[LayerShape, int, float]], itemsize: int) -> Roofline:
    """The roofline with the least mean relative error, found by growing and shrinking one constant at a time."""
    macs, moved, times = np.array(
        [(shape.macs(rows), shape.bytes(rows, itemsize), time) for shape, rows, time in samples]
    ).T

    def error(constants: np.ndarray) -> float:
        launch, rate, bandwidth = constants
        return float(np.mean(np.abs((launch + np.maximum(macs / rate, moved / bandwidth)) / times - 1)))

    # Start with a launch below the shortest time, and with the greatest rate and bandwidth that any sample reached.
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
