"""The methods of Table A1, one a file: diffusers' own pipeline where it has one, else written after the paper."""

from __future__ import annotations
