"""The errors cachekit raises. Every message names the argument or the site, its value, and the fix."""

from __future__ import annotations


class CacheError(Exception):
    """Base of every error that cachekit raises on purpose."""


class ArgumentError(CacheError, ValueError):
    """An argument has a value that cannot work."""


class ArgumentTypeError(CacheError, TypeError):
    """An argument has a type that cannot work."""


def check_version(path: object, version: object, known: int) -> None:
    """Refuse a file of another format than this release reads."""
    if version is True or version != known:
        raise ArgumentError(f"`path` {str(path)!r} has version {version!r}, this release reads {known}.")


class StructureError(CacheError, RuntimeError):
    """The model does not have, or no longer has, the structure that caching needs."""

    forward: str | None = None
    """How the model's forward failed when it was recorded, if it did."""


class StateError(CacheError, RuntimeError):
    """A state does not fit the call it was given to."""


class TraceWarning(UserWarning):
    """A setting that does nothing on a recorded run, or so much that a little more would spoil it."""
