"""Power, clocks, temperature and throttle reasons of the GPU that torch uses, from NVML (nvidia-ml-py).

Where NVML or one of its readings is missing the value is None and measuring goes on.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .measurements import Telemetry

SAMPLE_SECONDS = 0.02

# nvml.h, nvmlClocksEventReason*
THROTTLE_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal",
    0x040: "hw_thermal",
    0x080: "hw_power_brake",
    0x100: "display_clock",
}


def decode_throttle(mask: int) -> list[str]:
    """Names of the bits of an NVML clock-event mask; a bit without a name is given in hexadecimal."""
    bits = [1 << i for i in range(mask.bit_length()) if mask >> i & 1]
    return [THROTTLE_REASONS.get(bit, hex(bit)) for bit in bits]


class Reading(NamedTuple):
    """One sample: seconds of ``time.perf_counter``, W, MHz, NVML mask, joules since the driver was loaded."""

    seconds: float
    power_w: float | None
    sm_mhz: int | None
    throttle: int | None
    energy_j: float | None


class PowerMeter:
    """NVML handle of torch's current CUDA device. ``unavailable`` says why there is none, else None."""

    def __init__(self):
        self._nvml, self._handle, self.unavailable = None, None, None
        try:
            import pynvml
            import torch

            pynvml.nvmlInit()
            if pynvml.nvmlDeviceGetCount() == 1:
                self._handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            else:  # CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's
                uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            self._nvml = pynvml
        except Exception as error:  # no package, no driver, no GPU: all mean that there is nothing to read
            self.unavailable = f"{type(error).__name__}: {error}"

    def read(self, reading: Callable[[Any, Any], Any]) -> Any:
        """``reading(nvml, handle)``, or None where this card or driver does not offer it."""
        if self._nvml is None:
            return None
        try:
            return reading(self._nvml, self._handle)
        except (self._nvml.NVMLError, AttributeError):  # AttributeError: an older nvidia-ml-py
            return None

    def power_w(self) -> float | None:
        """Instantaneous board power, or where it is missing the mean of the last second."""

        def instant(nvml, handle) -> float | None:
            field = nvml.nvmlDeviceGetFieldValues(handle, [nvml.NVML_FI_DEV_POWER_INSTANT])[0]
            return field.value.uiVal / 1e3 if field.nvmlReturn == nvml.NVML_SUCCESS else None

        return self.read(instant) or self.read(
            lambda nvml, handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3
        )

    def energy_j(self) -> float | None:
        return self.read(lambda nvml, handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)

    def clock_mhz(self, domain: str) -> int | None:
        """Present clock; ``domain`` is "SM" or "MEM"."""
        return self.read(
            lambda nvml, handle: nvml.nvmlDeviceGetClockInfo(handle, getattr(nvml, f"NVML_CLOCK_{domain}"))
        )

    def throttle_mask(self) -> int | None:
        return self.read(lambda nvml, handle: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))

    def snapshot(self) -> Telemetry:
        return Telemetry(
            sm_mhz=self.clock_mhz("SM"),
            mem_mhz=self.clock_mhz("MEM"),
            power_w=self.power_w(),
            temperature_c=self.read(
                lambda nvml, h: nvml.nvmlDeviceGetTemperature(h, nvml.NVML_TEMPERATURE_GPU)
            ),
            throttle=decode_throttle(self.throttle_mask() or 0),
        )

    def sample(self) -> Reading:
        return Reading(
            time.perf_counter(), self.power_w(), self.clock_mhz("SM"), self.throttle_mask(), self.energy_j()
        )


@functools.cache
def meter() -> PowerMeter:
    """The one meter of this process."""
    return PowerMeter()


class Sampler:
    """Context manager: a thread that reads the meter every 20 ms into ``readings``."""

    def __init__(self, power_meter: PowerMeter, period_seconds: float = SAMPLE_SECONDS):
        self.readings: list[Reading] = []
        self._meter, self._period = power_meter, period_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power-sampler", daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            self.readings.append(self._meter.sample())

    def __enter__(self) -> Sampler:
        if self._meter.unavailable is None:
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def between(self, begin: float, end: float) -> list[Reading]:
        """Readings taken from ``begin`` to ``end``, in seconds of ``time.perf_counter``."""
        return [reading for reading in self.readings if begin <= reading.seconds <= end]


def counted_power_w(readings: list[Reading]) -> float | None:
    """Mean power from the energy counter, between its first and last change in ``readings``.

    The counter moves in steps of up to 0.1 s, so a window's ends fall inside of them; its changes do not.
    None when it is missing or changed less than twice.
    """
    known = [(r.seconds, r.energy_j) for r in readings if r.energy_j is not None]
    changes = [after for before, after in itertools.pairwise(known) if after[1] != before[1]]
    if len(changes) < 2:
        return None
    (t0, e0), (t1, e1) = changes[0], changes[-1]
    return (e1 - e0) / (t1 - t0)
