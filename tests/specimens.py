"""Tiny models of diffusers' classes, as tests need them."""

from __future__ import annotations

import functools

from torch import nn

from cachekit.diffusers import zoo

shared = functools.cache(zoo.specimen)
"""The same model at every call, and so what was recorded of it: for tests that change nothing about it."""


def shallow(name: str) -> zoo.Specimen:
    """With the first and the last block of every list alone: to compile it takes two thirds of the time."""
    specimen = zoo.specimen(name)
    for child in specimen.model.children():
        if isinstance(child, nn.ModuleList) and len(child) > 2:
            del child[1:-1]
    return specimen
