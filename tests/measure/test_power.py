"""Readings of NVML and what is made of them; on a machine without NVML, that measuring goes on."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_kernels.measure.power import PowerMeter, Reading, Sampler, counted_power_w, decode_throttle


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        (0, []),
        (0x4, ["sw_power_cap"]),
        (0x25, ["gpu_idle", "sw_power_cap", "sw_thermal"]),
        (0x1000004, ["sw_power_cap", "0x1000000"]),
    ],
)
def test_throttle_reasons_have_names(mask, names):
    assert decode_throttle(mask) == names


@given(watts=st.floats(50, 700), step=st.floats(0.02, 0.15), phase=st.floats(0, 0.15))
def test_a_counter_that_moves_in_steps_gives_the_power(watts, step, phase):
    times = [0.02 * i for i in range(150)]  # 3 s
    readings = [Reading(t, None, None, None, watts * step * ((t + phase) // step)) for t in times]
    assert counted_power_w(readings) == pytest.approx(watts, rel=0.02)


@pytest.mark.parametrize("energies", [[], [None, None, None], [5.0, 5.0, 5.0], [5.0, 5.0, 9.0]])
def test_no_power_from_a_counter_that_does_not_move(energies):
    readings = [Reading(float(i), None, None, None, energy) for i, energy in enumerate(energies)]
    assert counted_power_w(readings) is None


def test_the_sampler_reads_while_the_body_runs_and_then_stops():
    class Clock(PowerMeter):
        """A meter that is there and reads nothing but the time."""

        def __init__(self):
            super().__init__()
            self.unavailable = None

    begin = time.perf_counter()
    with Sampler(Clock(), period_seconds=0.005) as sampler:
        time.sleep(0.2)
    end = time.perf_counter()
    count = len(sampler.readings)
    assert count >= 5
    time.sleep(0.05)
    assert len(sampler.readings) == count
    assert sampler.between(begin, end) == sampler.readings and sampler.between(end, end + 1) == []


def test_without_nvml_there_are_no_values_but_a_reason():
    meter = PowerMeter()
    if meter.unavailable is None:
        pytest.skip("this machine has NVML")
    snapshot = meter.snapshot()
    assert (snapshot.sm_mhz, snapshot.power_w, snapshot.throttle) == (None, None, [])
    assert meter.unavailable
    with Sampler(meter) as sampler:
        pass
    assert sampler.readings == []
