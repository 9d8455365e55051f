"""What is kept of one uncached run: inner products and distances, instead of the values."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cachekit.deciders import Sums
from cachekit.deciders._decider import trajectory
from cachekit.errors import ArgumentError, ArgumentTypeError, StateError, check_version
from cachekit.methods._mag import MagRatios
from cachekit.planning.matrices import Recorded, between, mixed, of_rows, sum_of
from cachekit.planning.recording import RecordState
from cachekit.planning.sampler import noise_left, resampled, sizes_of
from cachekit.state import State, summary

FORMAT = 1
SITES = ("output", "chain", "probe", "rest")
"""What a recording has: what the model returns; residuals of whole chains; of the first block of the leading one; and
of the chains without that block, which FirstBlockCache leaves out."""
ONLY = ""
"""Name of the stream where there is one."""


NOTHING = "`state` holds no recording. Run the trajectory under cachekit.recording()."


@dataclass(frozen=True, eq=False)
class Trace:
    """Inner products of what one uncached run computed, step by step: all that a linear forecast depends on.

    Attributes:
        streams: stream -> site -> what was recorded of it; the sites are some of "output", "chain", "probe", "rest".
        timesteps: [T] float64, as given to `init`; NaN where only their number is known.
        step_sizes: [T] float64, how far the sampler goes with the value of each step.
        notes: what it was recorded from, for people: model, scheduler, guidance.
        weights: stream -> the factor with which the sampler takes its values; 1 where none is given.
        spread: how early errors count, see `carried`; None counts all alike.

    Raises:
        ArgumentError: the matrices do not fit together, `weights` names no stream, or `spread` is not positive.

    Example:
        >>> import torch, cachekit as ck
        >>> trace = ck.Trace.of([torch.ones(2), torch.tensor([1.0, 3.0])], [1000, 500])
        >>> trace.gram("output")
        tensor([[ 2.,  4.],
                [ 4., 10.]], dtype=torch.float64)
    """

    streams: Mapping[str, Mapping[str, Recorded]]
    timesteps: Tensor
    step_sizes: Tensor
    notes: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    spread: float | None = None

    def __post_init__(self) -> None:
        for name, each in (("timesteps", self.timesteps), ("step_sizes", self.step_sizes)):
            if not isinstance(each, Tensor) or each.ndim != 1:
                raise ArgumentTypeError(f"`{name}` must be a tensor [T], got {each!r}. Trace.of takes lists.")
        steps = len(self.timesteps)
        if tuple(self.step_sizes.shape) != (steps,):
            raise ArgumentError(
                f"`step_sizes` is {list(self.step_sizes.shape)}, and there are {steps} timesteps: give one a step."
            )
        for name, each in (("notes", self.notes), ("weights", self.weights)):
            if not isinstance(each, Mapping):
                raise ArgumentTypeError(f"`{name}` must be a mapping, got {type(each).__name__}.")
        if self.spread is not None and not (isinstance(self.spread, (int, float)) and 0 < self.spread < math.inf):
            raise ArgumentError(
                f"`spread` must be positive or None, got {self.spread!r}. 0.5 is half that of the noise."
            )
        if not bool(self.step_sizes.isfinite().all()) or self.step_sizes.sum() == 0:
            raise ArgumentError(f"`step_sizes` must be finite and go somewhere in all, got {self.step_sizes.tolist()}.")
        for name, weight in self.weights.items():
            if not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ArgumentError(f"`weights` must hold finite numbers, got {weight!r} for {name!r}.")
        if not self.streams:
            raise ArgumentError("`streams` is empty. A trace is of at least one stream.")
        if strange := [name for name in self.weights if name not in self.streams]:
            raise ArgumentError(f"`weights` names {strange[0]!r}, the streams are {list(self.streams)}.")
        for stream, sites in self.streams.items():
            for site, recorded in sites.items():
                if tuple(recorded.gram.shape) != (steps, steps):
                    raise ArgumentError(
                        f"The Gram matrix of {site!r} of stream {stream!r} is {list(recorded.gram.shape)}, and there "
                        f"are {steps} timesteps: give [{steps}, {steps}]."
                    )
                if spoilt := (~recorded.gram.diagonal().isfinite()).nonzero().flatten().tolist():
                    raise ArgumentError(
                        f"What was recorded of {site!r} of stream {stream!r} at step {spoilt[0]} is not finite. Record "
                        "a run that is, in a wider type."
                    )

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same, NaN too. That of a dataclass asks tensors for one truth, from 3.13 on."""
        if not isinstance(other, Trace):
            return NotImplemented
        names = [each.name for each in dataclasses.fields(self)]
        mine, theirs = (pytree.tree_flatten([getattr(each, name) for name in names]) for each in (self, other))
        return mine[1] == theirs[1] and all(map(_equal, mine[0], theirs[0]))

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def sites(self) -> tuple[str, ...]:
        """What was recorded, of every stream."""
        return tuple(site for site in SITES if all(site in sites for sites in self.streams.values()))

    # Making one ------------------------------------------------------------------------------------------------

    @classmethod
    def from_state(
        cls,
        state: State | Mapping[str, State],
        *,
        step_sizes: Sequence[float] | Tensor | None = None,
        notes: Mapping[str, Any] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> Trace:
        """What a run under `recording` has written down.

        Args:
            state: after the last step; or the states of several streams by name, {"cond": ..., "uncond": ...}, whose
                errors then add up by their squares, each times its weight.
            step_sizes: [T], how far the sampler goes with each step: for Euler steps of flow matching the differences
                of sigma. None takes those of the timesteps, which is the same up to a factor; or 1 throughout where
                they are not known.
            notes: for people, and for `cachekit.planned` to compare: model, scheduler, guidance.
            weights: with which factor the sampler takes the values of a stream. None for those of classifier-free
                guidance, `g` for "cond" and `1 - g` for "uncond", where these are the streams and `notes` have the
                guidance g, or g as "true_cfg_scale"; else 1.

        Raises:
            StateError: a trajectory is not finished, or was not run under `recording`; or they are not alike.
            ArgumentError: `step_sizes` is of another length, or `weights` names no stream.
        """
        states = {ONLY: state} if isinstance(state, State) else state
        if not isinstance(states, Mapping) or not all(isinstance(each, State) for each in states.values()):
            raise ArgumentTypeError(
                f"`state` must be a State, or a mapping of streams to such, got {type(state).__name__}. A cached step "
                "returns it."
            )
        streams, times = {}, None
        for name, each in states.items():
            log = summary(each)
            if log.steps < len(log.timesteps):
                raise StateError(
                    f"`state` {name!r} has done {log.steps} of {len(log.timesteps)} steps. Record whole trajectories."
                )
            if times is not None and not torch.equal(times.nan_to_num(), each.timesteps.nan_to_num()):
                raise StateError("`state` holds trajectories with different timesteps. Make a trace of each.")
            times = each.timesteps
            streams[name] = _recorded(each)
        if times is None:
            raise ArgumentError("`state` is an empty mapping. Give the state of at least one stream.")
        texts = _texts(notes)
        factors = _guided(streams, texts) if weights is None else weights
        return cls(streams, times.clone(), sizes_of(times, step_sizes), texts, factors)

    @classmethod
    def of(
        cls,
        values: Sequence[Tensor],
        timesteps: int | Sequence[float] | Tensor,
        *,
        step_sizes: Sequence[float] | Tensor | None = None,
        site: str = "output",
        notes: Mapping[str, Any] | None = None,
    ) -> Trace:
        """The trace of values that are at hand: one tensor a step, of any shape.

        Raises:
            ArgumentTypeError: they are no tensors.
            ArgumentError: they are not as many as the timesteps, or not of one shape.
        """
        if site not in SITES:
            raise ArgumentError(f"`site` must be one of {', '.join(map(repr, SITES))}, got {site!r}.")
        times = trajectory(timesteps)
        if not isinstance(values, (Sequence, Tensor)) or not all(
            isinstance(value, Tensor) and not value.is_complex() for value in values
        ):
            raise ArgumentTypeError(
                f"`values` must hold one tensor of real numbers a step, got {type(values).__name__}."
            )
        shapes = [list(value.shape) for value in values]
        if len(values) != len(times) or any(shape != shapes[0] for shape in shapes):
            raise ArgumentError(
                f"`values` must hold one tensor a step, of one shape: got {len(values)} for {len(times)} timesteps, of "
                f"shapes {', '.join(dict.fromkeys(map(str, shapes)))}."
            )
        rows = torch.stack([value.detach().flatten() for value in values])
        norms = [torch.linalg.vector_norm(value.detach().float(), dim=-1).flatten() for value in values]
        recorded = of_rows([rows], rows, [torch.stack(norms)])
        return cls({ONLY: {site: recorded}}, times, sizes_of(times, step_sizes), _texts(notes))

    # Asking it -------------------------------------------------------------------------------------------------

    def gram(self, site: str) -> Tensor:
        """[T, T] float64: inner products over all streams of a site."""
        return self._grams[self._known(site)]

    @functools.cached_property
    def _grams(self) -> dict[str, Tensor]:
        return {
            site: sum_of([self.share(name) * sites[site].gram for name, sites in self.streams.items()])
            for site in self.sites
        }

    def share(self, stream: str) -> float:
        """How much the square of an error of a stream counts."""
        return self.weights.get(stream, 1.0) ** 2

    def carried(self, spread: float | None) -> Trace:
        """The same trace, with errors counted by how much of them the sampler carries to the end.

        An error of an early step is an error of what is mostly noise, and the steps after it take most of it back. Of
        data as wide as `spread` times the noise, normally distributed, an error that is there at noise level t, from 1
        down to 0, arrives as `spread / sqrt((1 - t)^2 spread^2 + t^2)` of itself. Real data is not, and steps that are
        left out take nothing back: which spread plans best, if any, real runs tell. `cachekit.choose` tries several.

        The noise level is the timestep, of 1 or of 1000, where timesteps fall; else the share of the way still ahead.

        Args:
            spread: standard deviation of the data over that of the noise; None counts all errors alike.

        Raises:
            ArgumentError: `spread` is not positive.

        Example:
            >>> import torch, cachekit as ck
            >>> trace = ck.Trace.of([torch.ones(2)] * 4, 4).carried(0.5)
            >>> [f"{each:.2f}" for each in trace.reach.tolist()]
            ['0.66', '0.89', '1.11', '1.00']

        Source: the flow of rectified flow, arXiv 2209.03003, solved for a normal distribution.
        """
        if spread is not None and (isinstance(spread, bool) or not isinstance(spread, (int, float))):
            raise ArgumentTypeError(f"`spread` must be a number or None, got {type(spread).__name__}.")
        return dataclasses.replace(self, spread=spread)

    @functools.cached_property
    def reach(self) -> Tensor:
        """[T] float64: how far the sampler goes with an error of each step, in the end: its step size, carried."""
        if self.spread is None:
            return self.step_sizes
        left = noise_left(self.timesteps, self.step_sizes)
        return self.step_sizes * self.spread / (((1 - left) * self.spread).square() + left.square()).sqrt()

    def norm(self, site: str, coefficients: Tensor) -> Tensor:
        """The norms of combinations of the values of a site: coefficients [..., T] float64 -> [...]."""
        return ((coefficients @ self.gram(site)) * coefficients).sum(-1).clamp(min=0).sqrt()

    def sums(self, stream: str) -> list[list[Sums]]:
        """What a decider would be shown of the probe: `sums[step][computed]`, against the last computed step."""
        return self._sums[stream]

    @functools.cached_property
    def _sums(self) -> dict[str, list[list[Sums]]]:
        return {
            name: [
                [Sums(distance, size) for distance, size in zip(row, sites["probe"].magnitudes.tolist(), strict=True)]
                for row in sites["probe"].distances.tolist()
            ]
            for name, sites in self.streams.items()
            if "probe" in sites
        }

    @functools.cached_property
    def times(self) -> tuple[float, ...]:
        """The timesteps as numbers."""
        return tuple(self.timesteps.tolist())

    def mag_ratios(self, stream: str | None = None) -> MagRatios:
        """The magnitude ratios for `mag_cache`: those that `mag_calibration` would log.

        Args:
            stream: whose; None for the mean of all.
        """
        self._known("chain")
        if stream is not None and stream not in self.streams:
            raise ArgumentError(f"`stream` {stream!r} was not recorded; {list(self.streams)} were.")
        chosen = [sites["chain"].ratios for name, sites in self.streams.items() if stream in (None, name)]
        mean = torch.stack(chosen).mean(0)
        return MagRatios(
            tuple(mean.tolist()), model=self.notes.get("model", ""), scheduler=self.notes.get("scheduler", "")
        )

    def fit_polynomial(self, degree: int = 4) -> tuple[float, ...]:
        """Coefficients, highest power first, that tell the change of the output from that of the probe: TeaCache's.

        Least squares over all neighbouring steps of all streams, of the relative L1 change of the output by that of
        the residual of the first block.

        Raises:
            ArgumentError: `degree` is no int >= 0, or there are too few steps.

        Source: TeaCache, arXiv 2411.19108, section 3.3.
        """
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 0:
            raise ArgumentError(f"`degree` must be an int >= 0, got {degree!r}.")
        if len(self) < degree + 2:
            raise ArgumentError(f"`degree` is {degree}, and {len(self)} steps have {len(self) - 1} changes: take less.")
        for site in ("probe", "output"):
            self._known(site)
        seen, went = [], []
        for sites in self.streams.values():
            for site, into in (("probe", seen), ("output", went)):
                steps = torch.arange(1, len(self))
                into.append(sites[site].distances[steps, steps - 1] / sites[site].magnitudes[:-1])
        x, y = torch.cat(seen), torch.cat(went)
        if not bool(x.isfinite().all() and y.isfinite().all()):
            raise ArgumentError("The probe or the output is zero at a step, so what share of it changed is not known.")
        powers = torch.stack([x**power for power in range(degree, -1, -1)], dim=-1)
        return tuple(torch.linalg.lstsq(powers, y[:, None], driver="gelsd").solution[:, 0].tolist())

    def resample(
        self, timesteps: Sequence[float] | Tensor, *, step_sizes: Sequence[float] | Tensor | None = None
    ) -> Trace:
        """The trace of another trajectory, by interpolation between the steps that were recorded.

        Every value is taken as linear in the timestep between two recorded ones, and as that of the end beyond the
        ends: what a recording of that trajectory would give, as far as the sampler went the same way.

        Args:
            timesteps: of the trajectory.
            step_sizes: of its steps; None for those of its timesteps, or, where the trace was given others, for as
                much of their way as lies between two timesteps.

        Raises:
            ArgumentError: the timesteps of either are not known, or not in order.
        """
        times = trajectory(timesteps)
        for name, each in (("timesteps", times), ("the trace", self.timesteps)):
            falls = each.diff() < 0
            if bool(each.isnan().any()) or not (bool(falls.all()) or len(each) == 1):
                raise ArgumentError(f"`{name}` has no falling timesteps to interpolate over: {each.tolist()}.")
        weights = between(self.timesteps, times)
        streams = {
            name: {site: mixed(recorded, weights) for site, recorded in sites.items()}
            for name, sites in self.streams.items()
        }
        notes = {**self.notes, "resampled": f"from {len(self)} steps"}
        sizes = resampled(self.timesteps, self.step_sizes, times) if step_sizes is None else sizes_of(times, step_sizes)
        return Trace(streams, times, sizes, notes, self.weights, self.spread)

    def _known(self, site: str) -> str:
        if site not in self.sites:
            raise ArgumentError(
                f"{site!r} was not recorded of every stream, only {', '.join(self.sites) or 'nothing'}. Record it with "
                "cachekit.recording(sites=...)."
            )
        return site

    # Files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: some 10 KB a site and stream for 50 steps."""
        from safetensors.torch import save_file

        tensors = {"timesteps": self.timesteps, "step_sizes": self.step_sizes}
        for n, sites in enumerate(self.streams.values()):
            for site, recorded in sites.items():
                tensors.update({f"{n}/{site}/{name}": each for name, each in recorded._asdict().items()})
        about = {"version": FORMAT, "streams": list(self.streams), "notes": {**self.notes}}
        about |= {"weights": {**self.weights}, "spread": self.spread}
        # Clones: two sites may share their matrices, which the format refuses.
        copies = {name: each.clone(memory_format=torch.contiguous_format) for name, each in tensors.items()}
        save_file(copies, path, {"cachekit": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            ArgumentError: the file is no trace, or of a version this release does not know.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as opened:
                about = json.loads((opened.metadata() or {})["cachekit"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            version, names = about["version"], about["streams"]
            streams: dict[str, dict[str, Recorded]] = {name: {} for name in names}
            for key in tensors:
                n, slash, rest = key.partition("/")
                if slash and rest.endswith("/gram"):
                    site = rest.removesuffix("/gram")
                    fields = {each: tensors[f"{n}/{site}/{each}"] for each in Recorded._fields}
                    streams[names[int(n)]][site] = Recorded(**fields)
            weights = {str(name): float(each) for name, each in about["weights"].items()}
            sizes, spread = tensors["step_sizes"], about["spread"]
            made = cls(streams, tensors["timesteps"], sizes, _texts(about["notes"]), weights, spread)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ArgumentError(f"`path` {str(path)!r} holds no trace ({error!r}). Save it again.") from error
        check_version(path, version, FORMAT)
        return made


def _recorded(state: State) -> dict[str, Recorded]:
    """What a state has written down, by site."""
    by_site: dict[str, list[RecordState]] = {}
    for name, records in state.sites.items():
        for record in records:
            if not isinstance(record, RecordState):
                raise StateError(NOTHING)
            whole, _, part = name.partition("~")[0].partition(" (")
            site = part.removesuffix(")") or ("output" if whole == "output" else "chain")
            by_site.setdefault(site, []).append(record)
    if not by_site:
        raise StateError(NOTHING)
    made = {}
    for site, records in by_site.items():
        first = records[0]
        looked_at = (first.sample if first.sample.shape[1] else first.rows) if site in ("output", "probe") else None
        norms = [record.norms for record in records if record.norms.shape[1]]
        made[site] = of_rows([record.rows for record in records], looked_at, norms)
    return made


def check_trace(trace: Any) -> None:
    """Refuse what is no trace."""
    if not isinstance(trace, Trace):
        raise ArgumentTypeError(f"`trace` must be a Trace, got {type(trace).__name__}. Trace.from_state makes one.")


def _guided(streams: Mapping[str, Any], notes: Mapping[str, str]) -> dict[str, float]:
    """The factors of classifier-free guidance."""
    try:
        guidance = float(notes.get("true_cfg_scale") or notes["guidance"])
    except (KeyError, ValueError):
        return {}
    return {"cond": guidance, "uncond": 1 - guidance} if set(streams) == {"cond", "uncond"} else {}


def _texts(notes: Mapping[str, Any] | None) -> dict[str, str]:
    if notes is not None and not isinstance(notes, Mapping):
        raise ArgumentTypeError(f"`notes` must be a mapping of names to texts, got {type(notes).__name__}.")
    return {str(key): str(value) for key, value in (notes or {}).items()}


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and one == other
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
