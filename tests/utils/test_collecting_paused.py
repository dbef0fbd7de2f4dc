"""Garbage is left alone for a while, and collected again behind that."""

from __future__ import annotations

import gc

import pytest

from fisedit_compile.utils.collecting_paused import collecting_paused


def test_nothing_is_collected_within_the_context() -> None:
    assert gc.isenabled()
    with collecting_paused():
        assert not gc.isenabled()
        with collecting_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_an_error_ends_it() -> None:
    with pytest.raises(RuntimeError), collecting_paused():
        raise RuntimeError
    assert gc.isenabled()


def test_who_has_switched_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with collecting_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
