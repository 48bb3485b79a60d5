"""The plans of the experiments: every axis that the study needs, within the memory and the time there is."""

import itertools

import pytest

from mla_kernels.arguments import HEAD_DIM
from mla_kernels.measure.allocators import PAGE_SIZES
from mla_kernels.measure.calls import PrefillWorkload
from mla_kernels.measure.experiment import describe, each_of, loaded_seconds, merge, run_steps
from mla_kernels.measure.experiments import EXPERIMENTS, bandwidth, paging, peers, roofline
from mla_kernels.measure.figures import DECODE, flop, kv_bytes, moved_bytes, query_rows
from mla_kernels.measure.peers import FAST, SLOW
from mla_kernels.measure.points import BLOCKS, Step
from mla_kernels.measure.prefill_inputs import prefill_sets
from mla_kernels.measure.timing import RAMP_SECONDS, SUSTAINED_SECONDS
from mla_kernels.measure.workloads import sets_to_defeat_l2, spread_evenly, uniform

H200_L2 = 60 << 20


@pytest.mark.parametrize("scope", ["full", "live"])
@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_steps_fit_the_card(experiment, scope):
    for step in each_of(experiment.steps(scope)):
        assert set(step.sustain) <= set(step.implementations) >= set(step.count)
        if isinstance(step.workload, PrefillWorkload):
            sets, queries = prefill_sets(step.workload, H200_L2), moved_bytes(step.workload)
            assert sets * queries < 20e9 and sets <= 200 and flop(step.workload) < 5e13
            continue
        sets = sets_to_defeat_l2(step.workload, H200_L2)
        pages = sum(-(-length // 64) for length in step.workload.lengths)
        assert sets * pages * 64 * HEAD_DIM * 2 < 20e9, "pool in bytes"
        assert sets <= 4096 and flop(step.workload) < 5e12


@pytest.mark.parametrize(("scope", "seconds"), [("full", 210), ("live", 90)])
def test_sustained_load_fits_the_budget(scope, seconds):
    steps = [step for experiment in EXPERIMENTS.values() for step in experiment.steps(scope)]
    windows = sum(len(step.sustain) for step in steps)
    assert loaded_seconds(steps) == windows * (SUSTAINED_SECONDS + RAMP_SECONDS) <= seconds


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
    steps = list(each_of(bandwidth.steps(scope)))
    rotated = {step.workload for step in steps if step.rotate}
    still = [step.workload for step in steps if not step.rotate]
    assert still and all(workload in rotated for workload in still)
    assert min(map(kv_bytes, still)) < H200_L2 < max(map(kv_bytes, still))
    varied = [step.workload for step in steps if step.workload.lengths_kind in ("normal", "lognormal")]
    tokens_of_even = [sum(w.lengths) for w in rotated if w.lengths_kind == "uniform"]
    assert len(varied) == 4 and all(sum(w.lengths) in tokens_of_even for w in varied)
    assert any(step.count for step in steps)


OURS_AND_FAST = {DECODE, *(f"peer:{name}" for name in FAST)}


def peer_steps(scope="full"):
    return list(each_of(merge(list(peers.steps(scope)))))


def plain(workload):
    return len(set(workload.lengths)) == 1 and (workload.dtype, workload.s_q) == ("bf16", 1)


def test_the_grid_of_the_peers_is_the_one_asked_for():
    lengths = (1024, 4096, 16384, 65536)
    asked = set(itertools.product((8, 16, 32, 64, 128), (1, 4, 16, 64, 128, 256), lengths))
    asked |= set(itertools.product((8, 16, 32, 64, 128), (1, 4), (131072,)))
    on_grid = [step.workload for step in peer_steps() if peers.on_grid(step.workload)]
    assert sorted((w.h_q, w.b, w.lengths[0]) for w in on_grid) == sorted(asked)
    assert all(plain(w) and w.lengths_kind == "uniform" and not w.causal for w in on_grid)
    first = [step.workload for step in peers.steps("full")][: len(asked)]
    assert all(map(peers.on_grid, first)), "where time is short the grid goes first"


def test_peers_are_compared_off_the_grid_too():
    further = [step.workload for step in peer_steps() if not peers.on_grid(step.workload)]
    even = [
        w for w in further if plain(w) is False and w.lengths_kind == "uniform" and len(set(w.lengths)) > 1
    ]
    counted = [w for w in further if w not in even]
    assert len(counted) >= 80
    assert {w.s_q for w in counted} == {1, 2, 4} and all(w.causal for w in counted if w.s_q > 1)
    assert {w.lengths_kind for w in counted} == {"uniform", "normal", "lognormal"}
    assert {w.dtype for w in counted} == {"bf16", "fp16"}
    odd = {w.h_q for w in counted if w.h_q & (w.h_q - 1)}
    assert odd == {12, 20, 40, 48, 80, 96, 100}
    varied = [w for w in counted if w.lengths_kind != "uniform"]
    pairs = [step for step in peers.steps("full") if step.beside]
    assert {step.workload for step in pairs} == set(varied)
    for step in pairs:
        assert step.beside.workload == spread_evenly(step.workload)
        assert set(OURS_AND_FAST) <= set(step.beside.implementations) & set(step.implementations)


@pytest.mark.parametrize("scope", ["full", "live"])
def test_every_fast_peer_runs_beside_ours_everywhere(scope):
    steps = peer_steps(scope)
    assert all(set(step.implementations) >= OURS_AND_FAST for step in steps)
    assert not any(step.poison or not step.rotate for step in steps)
    assert all(set(step.sustain) in (set(), OURS_AND_FAST) for step in steps)
    assert any(step.sustain for step in steps) and any(step.host for step in steps)
    assert any("block:skeleton" in step.implementations for step in steps)
    assert {name for step in steps for name in step.implementations} >= {f"peer:{name}" for name in SLOW}


def test_what_is_asked_of_the_peers_under_load():
    loaded = {
        (s.workload.h_q, s.workload.b, s.workload.lengths[0], s.workload.s_q)
        for s in peer_steps()
        if s.sustain
    }
    assert loaded == {
        (16, 128, 4096, 1),
        (16, 64, 16384, 1),
        (64, 64, 16384, 1),
        (128, 64, 16384, 1),
        (128, 64, 16384, 2),
    }


def test_the_skeleton_is_beside_every_compute_bound_point():
    for step in peer_steps():
        w = step.workload
        compute_bound = w.h_q == 128 and w.b >= 32 and min(w.lengths) >= 8192
        assert ("block:skeleton" in step.implementations) == compute_bound


def test_slow_peers_run_where_their_caches_fit():
    steps = [step for step in peer_steps() if f"peer:{SLOW[0]}" in step.implementations]
    assert 3 <= len(steps) <= 6
    for step in steps:
        tokens, h_q = sum(step.workload.lengths), step.workload.h_q
        assert tokens * h_q * 2 * (192 + 192) < 8e9, "bytes of a decompressed cache, values padded to 192"


def test_peers_within_their_time():
    """15 samples, 4 to warm up, 2 to fill: about 2 ms each, or one call where that takes longer."""
    replays, seconds = 21, 0.0
    for step in peer_steps():
        w = step.workload
        call = max(moved_bytes(w) / 3.9e6, flop(w) / 560e6, 15.0)  # µs, of a peer that is not the best
        round_of_sets = call * sets_to_defeat_l2(w, H200_L2)
        seconds += len(step.implementations) * replays * max(2000, call, round_of_sets) / 1e6
    assert (
        seconds + loaded_seconds(peer_steps()) < 210
    )  # the rest of 7 minutes is binding, checking, capturing


def test_live_peers_are_a_dozen_points():
    assert len(peer_steps("live")) == 12
    assert {step.workload.dtype for step in peer_steps("live")} == {"bf16"}  # fp16 would compile for minutes


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


def test_what_stands_beside_a_step_and_by_itself_is_measured_once():
    one, other, third = (uniform(b, 64, h_q=16) for b in (2, 3, 4))
    steps = [
        Step(one, ("a",), beside=Step(other, ("a",))),
        Step(third, ("a",), beside=Step(one, ("b",))),
        Step(other, ("c",), rotate=False),
    ]
    assert merge(steps) == [
        Step(one, ("a", "b"), beside=Step(other, ("a",))),
        Step(third, ("a",)),
        Step(other, ("c",), rotate=False),
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


def test_pages_of_every_size_share_a_burst():
    for step in paging.steps("full"):
        sizes = [each.workload.page_size for each in step.together()]
        assert sizes == list(PAGE_SIZES)
        assert len({each.workload.model_copy(update={"page_size": 64}) for each in step.together()}) == 1


def test_progress_tells_page_sizes_apart(make_point):
    point = make_point()
    small = point.model_copy(update={"workload": point.workload.model_copy(update={"page_size": 16})})
    assert ", pages of 16:" in describe(small) and "pages" not in describe(point)
