"""The methods of Table A1, each in its file: diffusers' own pipeline if it has one, else written after the paper."""

from __future__ import annotations
