"""The plans of the experiments: every axis that the study needs, within the memory and the time there is."""

import pytest

from mla_kernels.arguments import HEAD_DIM
from mla_kernels.measure.experiment import describe, merge, run_steps
from mla_kernels.measure.experiments import EXPERIMENTS, bandwidth, roofline
from mla_kernels.measure.figures import DECODE, flop, kv_bytes, query_rows
from mla_kernels.measure.points import BLOCKS, Step
from mla_kernels.measure.timing import RAMP_SECONDS, SUSTAINED_SECONDS
from mla_kernels.measure.workloads import sets_to_defeat_l2, uniform

H200_L2 = 60 << 20


@pytest.mark.parametrize("scope", ["full", "live"])
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_steps_fit_the_card(experiment, scope):
    for step in experiment.steps(scope):
        sets = sets_to_defeat_l2(step.workload, H200_L2)
        pages = sum(-(-length // 64) for length in step.workload.lengths)
        assert sets * pages * 64 * HEAD_DIM * 2 < 20e9, "pool in bytes"
        assert sets <= 4096 and flop(step.workload) < 5e12
        assert set(step.sustain) <= set(step.implementations) >= set(step.count)


@pytest.mark.parametrize(("scope", "seconds"), [("full", 120), ("live", 70)])
def test_sustained_load_fits_the_budget(scope, seconds):
    windows = sum(len(step.sustain) for e in EXPERIMENTS.values() for step in e.steps(scope))
    assert windows * (SUSTAINED_SECONDS + RAMP_SECONDS) <= seconds


def test_roofline_crosses_every_axis():
    steps = list(roofline.steps("full"))
    axes = {(s.workload.h_q, s.workload.s_q, s.workload.lengths[0]) for s in steps}
    lengths = (1024, 4096, 16384, 65536)
    assert axes == {(h, s, n) for h in (1, 8, 16, 32, 64, 128) for s in (1, 2, 4) for n in lengths}
    assert all(step.implementations == (DECODE, *BLOCKS) for step in steps)


@pytest.mark.parametrize("scope", ["full", "live"])
def test_energy_roof_has_blocks_of_whole_tiles_at_several_intensities(scope):
    sustained = [step for step in roofline.steps(scope) if set(BLOCKS) <= set(step.sustain)]
    assert {query_rows(step.workload) for step in sustained} >= {64, 128, 256}


@pytest.mark.parametrize("scope", ["full", "live"])
def test_bandwidth_has_its_pairs(scope):
    steps = list(bandwidth.steps(scope))
    rotated = {step.workload for step in steps if step.rotate}
    still = [step.workload for step in steps if not step.rotate]
    assert still and all(workload in rotated for workload in still)
    assert min(map(kv_bytes, still)) < H200_L2 < max(map(kv_bytes, still))
    varied = [step.workload for step in steps if step.workload.lengths_kind in ("normal", "lognormal")]
    tokens_of_even = [sum(w.lengths) for w in rotated if w.lengths_kind == "uniform"]
    assert len(varied) == 4 and all(sum(w.lengths) in tokens_of_even for w in varied)
    assert any(step.count for step in steps)


def test_steps_at_one_workload_become_one():
    workload = uniform(2, 64, h_q=16)
    steps = [
        Step(workload, ("a", "b"), sustain=("a",)),
        Step(workload, ("a",), rotate=False),
        Step(workload, ("c", "b"), sustain=("c",), count=("b",)),
    ]
    assert merge(steps) == [
        Step(workload, ("a", "b", "c"), sustain=("a", "c"), count=("b",)),
        Step(workload, ("a",), rotate=False),
    ]


def test_no_measuring_without_a_hopper_gpu():
    from mla_kernels.device import DeviceUnavailable, hopper_available

    if hopper_available():
        pytest.skip("this machine has one")
    with pytest.raises(DeviceUnavailable, match="Hopper"):
        run_steps("roofline", "full", [])


def test_a_line_of_progress_says_what_came_of_a_point(make_point):
    assert "100.0 µs" in describe(make_point()) and "error 1.0e-03" in describe(make_point())
    failed = make_point(status="skipped", reason="no memory", samples_us=[])
    assert describe(failed).endswith("skipped: no memory")
