"""What a record keeps of memory management: latencies of allocations, bytes of batches, a churn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

BINS_PER_OCTAVE = 32  # of a latency: 2.2 % wide

Count = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _bins_of(nanoseconds: Sequence[int] | np.ndarray) -> np.ndarray:
    """The bin of each time; 0 counts as 1 ns."""
    times = np.maximum(np.asarray(nanoseconds, dtype=np.int64), 1)
    return np.floor(np.log2(times) * BINS_PER_OCTAVE).astype(int)


class Latency(_Section):
    """How long ``operation`` of ``allocator`` took on the host, each one timed by itself.

    ``counts[i]`` operations took between 2^(bins[i] / 32) and 2^((bins[i] + 1) / 32) ns. ``timer_ns`` is what
    the clock alone takes (median): it is in every figure.
    """

    allocator: str
    operation: str
    bins: list[int]
    counts: list[Annotated[int, Field(gt=0)]]
    min_ns: Count
    max_ns: Count
    timer_ns: Count

    @classmethod
    def of(cls, allocator: str, operation: str, nanoseconds: Sequence[int], timer_ns: int) -> Latency:
        """Of single times, at least one; a time of 0 counts as 1 ns."""
        times = np.maximum(np.asarray(nanoseconds, dtype=np.int64), 1)
        bins, counts = np.unique(_bins_of(times), return_counts=True)
        return cls(
            allocator=allocator,
            operation=operation,
            bins=bins.tolist(),
            counts=counts.tolist(),
            min_ns=int(times.min()),
            max_ns=int(times.max()),
            timer_ns=timer_ns,
        )

    @property
    def count(self) -> int:
        """Operations timed."""
        return sum(self.counts)

    def quantile_us(self, q: float) -> float:
        """The time that a share ``q`` of the operations did not exceed, in µs: at most a bin too large."""
        rank, passed = math.ceil(q * self.count), 0
        for index, count in zip(self.bins, self.counts, strict=True):
            passed += count
            if passed >= rank:
                return min(2 ** ((index + 1) / BINS_PER_OCTAVE), self.max_ns) / 1e3
        return self.max_ns / 1e3

    @model_validator(mode="after")
    def _check(self) -> Latency:
        if not self.bins or len(self.bins) != len(self.counts) or sorted(set(self.bins)) != self.bins:
            raise ValueError("bins must ascend, with a count each")
        ends = _bins_of([self.min_ns, self.max_ns]).tolist()  # quantiles are cut off at max_ns
        if ends != [self.bins[0], self.bins[-1]]:
            raise ValueError(
                f"min_ns {self.min_ns} and max_ns {self.max_ns} are of bins {ends}, "
                f"must be of the first and last, {self.bins[0]} and {self.bins[-1]}"
            )
        return self


class Footprint(_Section):
    """Bytes that the latents of batches of ``b`` sequences took: ``tokens[i]`` tokens in ``bytes[i]``.

    ``layout``: "paged" (in pages of ``page_size``), "padded" (to the batch's longest), "maximum" (to the
    longest of a model), "allocated" (a tensor for each sequence, as torch's allocator gives it out).
    """

    layout: str
    page_size: int | None = None
    b: Annotated[int, Field(gt=0)]
    tokens: list[Annotated[int, Field(gt=0)]]
    bytes: list[Annotated[int, Field(gt=0)]]

    @model_validator(mode="after")
    def _check(self) -> Footprint:
        if len(self.tokens) != len(self.bytes) or not self.tokens:
            raise ValueError("tokens and bytes must be as many, one at least")
        return self


class Churn(_Section):
    """Sequences that come, grow and go, for ``events`` events, sampled evenly.

    ``live_bytes``: the latents themselves. ``held_bytes``: what the allocator holds for them.
    """

    allocator: str
    events: Annotated[int, Field(gt=0)]
    live_bytes: list[Count]
    held_bytes: list[Count]

    @model_validator(mode="after")
    def _check(self) -> Churn:
        if len(self.live_bytes) != len(self.held_bytes) or not self.live_bytes:
            raise ValueError("live_bytes and held_bytes must be as many, one at least")
        for live, held in zip(self.live_bytes, self.held_bytes, strict=True):
            if held < live:
                raise ValueError(
                    f"held_bytes is {held} where live_bytes is {live}: latents must lie somewhere"
                )
        return self
