"""What a call of a pipeline did, as values and as a table."""

from __future__ import annotations

from typing import NamedTuple

from cachekit.plans import pattern
from cachekit.state import human_bytes


class StreamReport(NamedTuple):
    """What one stream did."""

    policy: str  # its name
    computed: tuple[bool, ...]  # one a call of the transformer
    seconds: float  # that the host spent in these calls; it does not wait for a GPU
    setup_seconds: float  # before, to look at the model (once for each shape of inputs) and to make states
    state_bytes: int  # remembered from step to step

    @property
    def skipped(self) -> int:
        """How many calls left something out."""
        return len(self.computed) - sum(self.computed)


class Report(NamedTuple):
    """What the last call did; `str` is a table."""

    streams: dict[str, StreamReport]  # by transformer and stream
    unused: tuple[str, ...]  # keys of the mapping of policies that no stream has

    def __str__(self) -> str:
        if not self.streams:
            return "no call of the pipeline yet"
        width = max(map(len, self.streams))
        rows = [
            f"{'stream':<{width}} {'computed':>8} {'skipped':>7} {'seconds':>8} {'setup':>8} {'state':>10}  pattern"
        ]
        for name, stream in self.streams.items():
            counts = f"{name:<{width}} {sum(stream.computed):>8} {stream.skipped:>7}"
            times = f"{stream.seconds:>8.3f} {stream.setup_seconds:>8.3f} {human_bytes(stream.state_bytes):>10}"
            rows.append(f"{counts} {times}  {pattern(stream.computed)}  {stream.policy}")
        if self.unused:
            rows.append(f"policies for streams that were not called: {', '.join(self.unused)}")
        return "\n".join(rows)
