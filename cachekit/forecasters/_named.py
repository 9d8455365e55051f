"""A forecaster by its name, as a file keeps it."""

from __future__ import annotations

from cachekit.errors import ArgumentError
from cachekit.forecasters._forecaster import Forecaster
from cachekit.forecasters._hold import hold
from cachekit.forecasters._newton import newton
from cachekit.forecasters._taylor import taylor
from cachekit.forecasters._two_point import two_point


def named(name: str) -> Forecaster:
    """The forecaster that has this name.

    Args:
        name: "hold", "newton K", "newton K repaid", "taylor K", "two-point W" or "two-point ramp".

    Raises:
        ArgumentError: none of this module's forecasters has this name.

    Example:
        >>> import cachekit as ck
        >>> ck.forecasters.named("newton 1").name
        'newton 1'
    """
    kind, _, setting = name.partition(" ")
    try:
        if kind == "newton" and setting.endswith(" repaid"):
            return newton(int(setting.removesuffix(" repaid")), repay=True)
        if kind in ("newton", "taylor"):
            return (newton if kind == "newton" else taylor)(int(setting))
        if kind == "two-point":
            return two_point(setting if setting == "ramp" else float(setting))
        if name == "hold":
            return hold()
    except ValueError:
        pass
    raise ArgumentError(
        f"`name` {name!r} is none of 'hold', 'newton K', 'newton K repaid', 'taylor K', 'two-point W'. Give the "
        "forecaster itself where it is one of your own."
    )
