"""Which device each of several workers draws on."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from fisedit_compile.quality.workers import device_of_worker


@pytest.mark.parametrize(
    ("asked", "of_workers"),
    [("cuda", ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]), ("cuda:1", ["cuda:1"] * 4), ("cpu", ["cpu"] * 4)],
)
def test_workers_take_the_devices_in_turns(asked: str, of_workers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    begun = multiprocessing.get_context("spawn").Value("i", 0)
    devices = [device_of_worker(torch.device(asked), begun) for _ in of_workers]
    assert [str(device) for device in devices] == of_workers
    assert taken == (devices if asked == "cuda" else [])
