"""What a timed loop leaves in a record, whatever was timed: samples, snapshots of the card, ceilings."""

from __future__ import annotations

import statistics
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Microseconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Mode = Literal["burst", "sustained"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Telemetry(Section):
    """A snapshot of the card; a value the driver does not give is null."""

    sm_mhz: Count | None
    mem_mhz: Count | None
    power_w: float | None
    temperature_c: float | None
    throttle: list[str]


class Sustained(Section):
    """A window of uninterrupted load after the ramp-up: ``calls`` calls in ``seconds``.

    ``energy_j`` is what the card's energy counter gives for the window (its slope between the counter's
    changes, times ``seconds``), null where there is no counter.
    """

    seconds: Annotated[float, Field(gt=0)]
    calls: Annotated[int, Field(gt=0)]
    ramp_seconds: Annotated[float, Field(ge=0)]
    energy_j: Annotated[float, Field(gt=0)] | None
    power_samples_w: list[float]
    sm_mhz_samples: list[Count]
    throttle: list[str]

    @property
    def mean_power_w(self) -> float | None:
        """Watts over the window: from the energy counter, else the samples; None if neither is there."""
        if self.energy_j is not None:
            return self.energy_j / self.seconds
        return statistics.fmean(self.power_samples_w) if self.power_samples_w else None


class Measurement(Section):
    """What a timed loop leaves behind, whatever was timed."""

    mode: Mode
    samples_us: list[Microseconds] = []
    calls_per_sample: Count = 0
    before: Telemetry | None = None
    after: Telemetry | None = None
    sustained: Sustained | None = None

    @property
    def per_call_us(self) -> float:
        """Time of one call in µs: median sample in a burst, window over its calls when sustained."""
        if self.sustained is not None:
            return 1e6 * self.sustained.seconds / self.sustained.calls
        return statistics.median(self.samples_us)

    def require_samples(self) -> None:
        if not self.samples_us or self.calls_per_sample < 1:
            raise ValueError("a measurement needs samples_us and calls_per_sample >= 1")
        if (self.mode == "sustained") != (self.sustained is not None):
            must = "given" if self.mode == "sustained" else "null"
            raise ValueError(f"mode is {self.mode!r}, so `sustained` must be {must}")


class Ceiling(Measurement):
    """A limit of this card measured in the same run: ``bytes`` read or ``flop`` done by one call."""

    name: str
    flop: Annotated[int, Field(gt=0)] | None = None
    bytes: Annotated[int, Field(gt=0)] | None = None

    @property
    def unit(self) -> str:
        return "TFLOP/s" if self.flop is not None else "TB/s"

    @property
    def value(self) -> float:
        """The ceiling in ``unit``."""
        return (self.flop if self.flop is not None else self.bytes) / self.per_call_us / 1e6

    @model_validator(mode="after")
    def _check(self) -> Ceiling:
        self.require_samples()
        if (self.flop is None) == (self.bytes is None):
            raise ValueError("a ceiling counts either flop or bytes")
        return self
