"""Variants as implementations: names, what cannot be built, and the table that their times speak for."""

import dataclasses

import pytest

from mla_kernels.choice import SHIPPED, Cost, Share, TuningTable, load_table
from mla_kernels.compiler import CompileError
from mla_kernels.measure import __main__ as command
from mla_kernels.measure import candidates, experiment, points
from mla_kernels.measure.candidates import (
    SHIPPED_ROWS,
    best_of,
    best_table,
    fit_cost,
    name_of,
    speeds,
    tuning_of,
)
from mla_kernels.measure.experiments import tuning as plan
from mla_kernels.measure.figures import query_rows
from mla_kernels.measure.points import Step
from mla_kernels.measure.records import RecordError, Variant, load_record, save_record
from mla_kernels.measure.workloads import materialize, uniform
from mla_kernels.tuning import ROWS, TuningError

AHEAD, SHIPPED_64 = name_of("ahead_boxes=1", rows=64), name_of(rows=64)


@pytest.fixture
def timed(make_point):
    """Points of {(implementation, h_q): µs}, each at two workloads, with work in plenty."""

    def make(times):
        return [
            make_point(name, h_q=h_q, us=us * factor, lengths=(length,) * b)
            for (name, h_q), us in times.items()
            for b, length, factor in ((128, 4096, 1.0), (64, 16384, 2.0))
        ]

    return make


@pytest.fixture
def shipped(timed):
    """The shipped variants, 100 µs everywhere, and what is added."""
    base = {(name_of(rows=min(h_q, 64)), h_q): 100.0 for h_q in plan.FULL_HEADS}
    return lambda **more: timed(base | more.get("more", {}))


def test_a_name_and_its_tuning():
    assert AHEAD == "mla_kernels[rows=64,ahead_boxes=1]"
    assert tuning_of(AHEAD).ahead_boxes == 1 and tuning_of(SHIPPED_64) == SHIPPED.of_rows(64)
    assert candidates.is_candidate(AHEAD) and not candidates.is_candidate("mla_kernels")
    assert candidates.rows_of("mla_kernels[rows=64,group_slots=9]") == 64
    for wrong in ("mla_kernels", "mla_kernels[rows=64", "mla_kernels[rows=64,group_slots=9]"):
        with pytest.raises(TuningError):
            tuning_of(wrong)


def test_a_candidate_is_bound_like_the_operator():
    inputs = materialize(uniform(2, 64, h_q=16), device="cpu", sets=3)
    bound = points.bind(AHEAD, inputs)
    assert len(bound.calls) == 3 and bound.out.shape == (2, 1, 16, 512)
    with pytest.raises(TuningError, match="group_slots"):
        points.bind("mla_kernels[rows=64,group_slots=2]", inputs)


@pytest.fixture
def compiled(monkeypatch):
    """Names of what was compiled; compiling "ahead_boxes=4" fails."""
    names = []

    def compile_kernel(config):
        if "ahead_boxes=4" in config.name:
            raise CompileError(f"{config.name}: too many registers")
        names.append(config.name)

    monkeypatch.setattr(candidates, "compile_kernel", compile_kernel)
    return names


def test_what_cannot_be_built_is_known_with_its_reason_before_anything_is_timed(compiled):
    unfit, broken = name_of("register_steps=12", rows=64), name_of("ahead_boxes=4", rows=64)
    steps = [
        Step(uniform(1, 64, h_q=64), (SHIPPED_64, unfit, "peer:fa3")),
        Step(uniform(1, 64, h_q=128), (SHIPPED_64, broken, "mla_kernels")),
        Step(uniform(1, 64, h_q=64, dtype="fp16"), (AHEAD,)),
    ]
    absent, built = experiment.prepare_candidates(steps)
    assert set(absent["bf16"]) == {unfit, broken} and not absent["fp16"]
    assert absent["bf16"][unfit].startswith("does not fit: shared memory is ")
    assert absent["bf16"][broken].startswith("does not compile: decode_rows-bf16-64+ahead_boxes=4")
    names = ["decode_rows-bf16-64", "decode_rows-fp16-64+ahead_boxes=1"]
    assert sorted(compiled) == names == sorted(config.name for config in built)


def test_speeds_are_over_the_shipped_variant_that_serves_the_workload(shipped, make_point):
    found = speeds(shipped(more={(AHEAD, 64): 80.0, (AHEAD, 128): 125.0, (name_of(rows=32), 64): 50.0}))
    assert sorted(found[AHEAD].values()) == [0.8, 0.8, 1.25, 1.25]
    assert list(found[name_of(rows=32)].values()) == [1, 1]  # where it serves, and not at 64
    little = [make_point(name, h_q=64, us=us, lengths=(1024,)) for name, us in ((AHEAD, 9), (SHIPPED_64, 10))]
    assert speeds([]) == {} == speeds(little)  # other rows serve so little work, and they were not timed


def test_the_best_is_fastest_over_all_that_it_would_serve(shipped):
    other = name_of("item_units=1", rows=64)
    times = {(AHEAD, 64): 85.0, (AHEAD, 128): 110.0, (other, 64): 80.0, (other, 128): 101.0}
    assert best_of(shipped(more=times), 64) == (other, pytest.approx((1 / 0.8 / 1.01) ** 0.5))
    del times[other, 128]  # timed at half of them
    assert best_of(shipped(more=times), 64)[0] == AHEAD


def test_where_there_was_no_choice_nothing_is_missing(shipped, make_point):
    """Workloads for the costs have the shipped variants of all rows, and no others."""
    faster = shipped(more={(AHEAD, 64): 90.0, (AHEAD, 128): 90.0})
    costs = [make_point(name_of(rows=rows), h_q=128, us=80.0, lengths=(1024,) * 128) for rows in ROWS]
    assert candidates.shipped_rows(costs[0].workload, candidates.BEFORE_PAIRS) == 64
    assert best_of(faster + costs, 64) == best_of(faster, 64) == (AHEAD, pytest.approx(1 / 0.9))


def test_what_gains_less_than_noise_is_not_taken(shipped):
    assert best_of(shipped(more={(AHEAD, 64): 99.5, (AHEAD, 128): 99.5}), 64) == (SHIPPED_64, 1.0)
    assert best_of([], 64) == (SHIPPED_64, 1.0)


def test_the_table_without_a_gain_is_the_shipped_one(shipped):
    assert best_table(shipped()) == SHIPPED == best_table([])


def test_the_table_takes_variants_that_gain(shipped):
    table = best_table(shipped(more={(AHEAD, 64): 90.0, (AHEAD, 128): 90.0, (name_of(rows=16), 32): 80.0}))
    assert table.variants == (*SHIPPED.variants[:3], tuning_of(AHEAD), *SHIPPED.variants[4:])
    assert [cost for cost, _ in table.entries] == [cost for cost, _ in SHIPPED.entries]
    assert table.serving_many(64) == tuning_of(AHEAD)


@pytest.fixture
def costing(make_point):
    """Points of the tuner's plan at which the shipped variant of ``rows`` is timed, if it costs ``cost``."""

    def make(cost, rows, **fields):
        found = []
        for workload in (
            step.workload for step in plan.steps("full") if name_of(rows=rows) in step.implementations
        ):
            tiles = workload.lengths[0] // 64
            share = Share.of(SHIPPED.of_rows(rows), query_rows(workload), workload.b, tiles, 132)
            us = cost.expected_us(share, tiles * workload.b)
            found.append(make_point(name_of(rows=rows), workload=workload, us=us, **fields))
        return found

    return make


COSTS = (Cost(5.0, 1.2, 3.0), Cost(8.0, 2.4, 6.0), Cost(10.0, 1.9, 2.0))


@pytest.mark.parametrize("cost", COSTS, ids=str)
@pytest.mark.parametrize("rows", SHIPPED_ROWS)
def test_a_cost_is_found_again(costing, rows, cost):
    found = dataclasses.astuple(fit_cost(costing(cost, rows), rows))
    assert found == pytest.approx(dataclasses.astuple(cost), rel=0.01)


def test_the_table_has_each_rows_own_cost(costing):
    known = dict(zip(SHIPPED_ROWS, (*COSTS, Cost(9.0, 2.0, 7.0), Cost(11.0, 1.7, 6.0)), strict=True))
    table = best_table([point for rows, cost in known.items() for point in costing(cost, rows)])
    for found, tuning in table.entries:
        assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(known[tuning.rows]), rel=0.01)
    assert table.variants == SHIPPED.variants


def test_with_too_little_to_see_a_cost_the_shipped_one_stays(costing):
    shipped, cost = SHIPPED.entries[1][0], COSTS[1]
    enough = costing(cost, 16)
    assert fit_cost(enough, 16) != shipped
    assert fit_cost([], 16) == shipped == fit_cost(enough[-5:-1], 16) != fit_cost(enough[-5:], 16)
    for one_kind in (True, False):  # all split, or none: start and merge cannot be told apart
        of_kind = [p for p in enough if (p.workload.b < 16) == one_kind]
        assert fit_cost(of_kind * 3, 16) == shipped
    backwards = [p.model_copy(update={"samples_us": [1e4 / p.per_call_us] * 15}) for p in enough]
    assert fit_cost(backwards, 16) == shipped  # the more tiles, the faster: no cost is negative


def test_only_what_shows_a_cost_counts(costing, make_point):
    """Neither sustained load, nor what failed, other variants, uneven lengths, or calls that HBM binds."""
    points, name = costing(COSTS[0], 16), name_of(rows=16)
    wrong = [
        *costing(COSTS[1], 16, power_w=500.0),
        *costing(COSTS[1], 16, status="failed", reason="wrong", samples_us=[], error=None),
        *costing(COSTS[1], 32),
        make_point(name_of("item_units=6", rows=16), h_q=128, us=1e4),
        make_point(name, h_q=128, us=1e4, lengths=(64, 4096)),
        make_point(name, h_q=16, us=1e4, lengths=(16384,) * 64),
    ]
    assert fit_cost(points + wrong, 16) == fit_cost(points, 16)


def test_a_record_keeps_the_table_and_the_operator_reads_it(tmp_path, make_record):
    other = dataclasses.replace(tuning_of(AHEAD), min_tiles=2, align_percent=0, programmatic=False)
    table = TuningTable(((COSTS[0], SHIPPED.of_rows(16)), (COSTS[1], other)))
    record = make_record(tuning=[Variant(**entry) for entry in table.to_json()])
    save_record(record, tmp_path / "tuning.json")
    assert load_table(tmp_path / "tuning.json") == table
    assert candidates.table_of(load_record(tmp_path / "tuning.json")) == table


def test_a_record_with_a_table_that_cannot_be_is_refused(tmp_path, make_record):
    entries = SHIPPED.to_json()
    entries[0]["group_slots"] = 2
    broken = make_record().model_copy(update={"tuning": [Variant(**entry) for entry in entries]})
    with pytest.raises(RecordError, match="group_slots is 2, must be at least 3"):
        save_record(broken, tmp_path / "tuning.json")


def test_the_plan_has_the_shipped_variant_first_and_ablations():
    for scope, count in (("full", 15), ("live", 3)):
        steps = list(plan.steps(scope))
        for step in steps[:count]:
            rows = candidates.shipped_rows(step.workload)
            assert step.implementations[0] == name_of(rows=rows)
            assert name_of("programmatic=0", rows=rows) in step.implementations
            assert len(step.implementations) >= 8
            assert {candidates.rows_of(name) for name in step.implementations} == {rows}
        everywhere = tuple(name_of(rows=rows) for rows in SHIPPED_ROWS)
        assert [step.implementations for step in steps[count:]] == [everywhere] * (len(steps) - count)
        assert len(steps) - count == (len(plan.COSTS) if scope == "full" else 0)
    full = list(plan.steps("full"))
    ablated = {candidates.rows_of(name) for step in full[:15] for name in step.implementations}
    assert ablated == set(SHIPPED_ROWS) and sum(len(step.implementations) for step in full) < 200


def test_plan_within_its_time():
    """21 replays of 2 ms or of one call, and as much again to bind, check and capture."""
    for scope, limit in (("full", 40), ("live", 12)):
        seconds = 0.0
        for step in plan.steps(scope):
            call = max(step.workload.b * step.workload.lengths[0] * 1152 / 3.9e6, 15.0) * 1.5
            seconds += len(step.implementations) * 2 * 21 * max(2000, call) / 1e6 + 0.5
        assert seconds < limit


def test_candidates_that_do_not_fit_are_few_and_meant():
    names = {name for step in plan.steps("full") for name in step.implementations}
    unfit = []
    for name in names:
        try:
            tuning_of(name)
        except TuningError:
            unfit.append(name)
    assert unfit == [name_of("register_steps=12", rows=64)]


def test_tune_prints_what_each_is_worth(monkeypatch, tmp_path, capsys, make_record, shipped):
    found = shipped(more={(AHEAD, 64): 80.0, (AHEAD, 128): 80.0})
    unfit = name_of("register_steps=12", rows=64)
    found.append(
        found[0].model_copy(
            update={"implementation": unfit, "status": "skipped", "reason": "no room", "samples_us": []}
        )
    )
    record = make_record(experiment="tuning", points=found)
    monkeypatch.setattr(plan, "run_steps", lambda *a, **k: record)
    assert command.main(["tune", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"export MLA_KERNELS_TUNING={tmp_path / 'tuning.json'}" in out
    lines = out.splitlines()
    assert any("ahead_boxes=1" in line and "× 1.250 (1.250 to 1.250, 4 workloads)" in line for line in lines)
    assert any("register_steps=12" in line and "no room" in line for line in lines)
    assert "rows=64 ahead_boxes=1: 10.5 us, 1.91 a tile, 4.1 to merge" in lines
    assert "rows=8 as shipped: 5.4 us, 0.98 a tile, 2.5 to merge" in lines
    assert load_table(tmp_path / "tuning.json").of_rows(64) == tuning_of(AHEAD)
