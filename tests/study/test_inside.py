"""Budgets are the arithmetic of the instructions, drawings are consistent, ablations are what was timed."""

import dataclasses
import math

import matplotlib

matplotlib.use("Agg")

import pytest

from mla_kernels.choice import SHIPPED
from mla_kernels.measure import candidates
from mla_kernels.measure.experiments import tuning as plan
from mla_kernels.measure.records import Variant
from mla_kernels.study import ablations, drawings, inside
from mla_kernels.study.findings import findings
from mla_kernels.tuning import ROWS, TuningError

OF_64 = SHIPPED.of_rows(64)
LIMIT_BYTES = 150 * 1024


def cycles(tuning, **arguments):
    parts = inside.budget(tuning, 20.0, **arguments)
    return parts.set_index(["unit", "part"]).cycles


def test_a_tile_of_64_rows_by_hand():
    parts = cycles(dataclasses.replace(OF_64, register_steps=16))
    assert parts[inside.TENSOR, "QKᵀ"] == 36 * 32 and parts[inside.TENSOR, "PV"] == 1024
    assert parts[inside.SHARED, "QKᵀ"] == 16 * 16 + 20 * 32 and parts[inside.SHARED, "PV"] == 16 * 48
    assert parts[inside.SHARED, "writes by TMA"] == 576 and parts[inside.SHARED, "writes of P"] == 64
    assert parts[inside.HBM, "reads"] == 73_728 / 20
    assert cycles(OF_64, sharing=2)[inside.HBM, "reads"] == 73_728 / 40


def test_a_half_tile_of_a_pair_by_hand():
    """18 steps of QK^T for each of two warpgroups, 4 of them with queries in registers; 24 KB of messages."""
    parts = cycles(SHIPPED.of_rows(128))
    assert parts[inside.TENSOR, "QKᵀ"] == 2 * 18 * 32 and parts[inside.TENSOR, "PV"] == 2 * 4 * 128
    assert parts[inside.SHARED, "QKᵀ"] == 2 * (4 * 16 + 14 * 32) and parts[inside.SHARED, "PV"] == 2 * 4 * 64
    assert parts[inside.SHARED, "writes by TMA"] == 288 and parts[inside.SHARED, "messages"] == 2 * 192
    assert parts[inside.HBM, "reads"] == 36_864 / 20


@pytest.mark.parametrize("rows", (*ROWS, 128))
def test_tensor_cycles_are_the_flop(rows):
    flop = 2 * min(rows, 64) * 64 * (576 + 512)  # of a pair in each CTA half of 128 rows'
    assert cycles(SHIPPED.of_rows(rows))[inside.TENSOR].sum() == pytest.approx(flop / 4096)


def test_queries_in_registers_take_shared_memory_cycles_away():
    less, more = (
        cycles(dataclasses.replace(OF_64, group_slots=3, register_steps=n))[inside.SHARED].sum()
        for n in (20, 4)
    )
    assert more - less == 16 * 16


@pytest.mark.parametrize("changes", [{}, {"ahead_boxes": 1}, {"ahead_boxes": 4}, {"group_slots": 4}])
def test_the_drawn_schedule_is_possible(changes):
    made = dataclasses.replace(OF_64, **changes)
    ideal, roles = drawings.ideal(made), drawings.roles(made, tiles=6)
    assert ideal.period == inside.totals(inside.budget(made, math.inf)).max()
    for _, lane in roles.groupby("lane"):
        ordered = lane.sort_values("begin")
        assert (ordered.begin.iloc[1:].to_numpy() >= ordered.end.iloc[:-1].to_numpy() - 1e-6).all()
    for tile, steps in roles.groupby("tile"):
        ends, begins = steps.groupby("what").end.max(), steps.groupby("what").begin.min()
        assert ends["in flight"] <= begins["QKᵀ"] + 1e-6 and ends["QKᵀ"] <= begins["softmax, P"] + 1e-6, tile
        assert ends["softmax, P"] <= begins["PV"] + 1e-6
    held = roles[roles.lane.str.startswith("loads")].set_index("tile").begin
    at = 4 * ideal.period  # every group that was asked for and is not given back has a slot
    given_back = (held.index + 2) * ideal.period
    assert ((held < at) & (given_back > at)).sum() <= made.group_slots or ideal.flight == 0


def test_the_life_of_a_box_has_no_gap():
    for _, box in drawings.life_of_boxes(OF_64).groupby("lane"):
        assert box.begin.iloc[1:].tolist() == pytest.approx(box.end.iloc[:-1].tolist())


def test_drawings_are_small(shown):
    drawings.plot_shared_plan(), drawings.plot_roles(OF_64), drawings.plot_life(OF_64)
    assert len(shown) == 3 and all(file.stat().st_size < LIMIT_BYTES for file in shown)


def test_measured_cycles_are_time_times_clock_over_tiles(card, roofline):
    point = next(p for p in roofline.points if p.workload.h_q == 128 and p.workload.s_q == 1)
    w = point.workload
    tiles = 2 * w.b * w.lengths[0] / 64 / 132
    assert inside.cycles_a_tile(roofline, point) == pytest.approx(point.per_call_us * 1980 / tiles)


def test_the_ladder_and_the_budgets_of_a_record(roofline, shown):
    ladder, budgets = inside.plot_ladder(roofline), inside.plot_budget(roofline)
    assert len(shown) == 2 and all(file.stat().st_size < LIMIT_BYTES for file in shown)
    assert ladder["query rows"].tolist() == budgets["query rows"].tolist() == [1, 8, 16, 32, 64, 128]
    assert ladder.notna().all(axis=None) and (ladder["its loads alone"] > ladder["mla_decode"]).all()
    assert (budgets.binds[:4] == inside.HBM).all()
    assert "128 rows" in inside.steps_in_words(budgets) and "1 rows HBM" in inside.limits_in_words(budgets)


@pytest.fixture(scope="module")
def tuned(card):
    """The tuner's live steps: each variant is 2 % slower than the one before, one cannot be built."""
    points = []
    for step in plan.steps("live"):
        for i, name in enumerate(step.implementations):
            try:
                candidates.tuning_of(name)
            except TuningError as error:
                found = {"status": "skipped", "reason": f"does not fit: {error}", "samples_us": []}
                points.append(card.point(name, step.workload, us=1.0, **found))
            else:
                points.append(card.point(name, step.workload, us=100 * 1.02**i))
    table = [Variant(**entry) for entry in candidates.best_table(points).to_json()]
    return card.record("tuning", points, tuning=table)


def test_ablations_are_over_the_shipped_variant(tuned, shown):
    data = ablations.plot_ablations(tuned, candidates.SHIPPED_ROWS)
    assert len(shown) == 1 and shown[0].stat().st_size < LIMIT_BYTES
    assert set(data.rows) <= set(candidates.SHIPPED_ROWS) and data.variant.is_unique
    assert set(data.variant) == {candidates.changes_of(name) for name in candidates.speeds(tuned.points)}
    assert (data.groupby("rows").gain.max() == 1).all()
    assert (data.gain <= 1).all() and "0 of" in ablations.in_words(data)


def test_a_variants_gain_is_over_all_that_its_rows_serve(card):
    """At 128 query rows little work is served by few rows, and much by many."""
    points = []
    for step in list(plan.steps("full"))[12:15]:
        names = (step.implementations[0], step.implementations[1])
        points += [card.point(name, step.workload, us=100 + 10 * i) for i, name in enumerate(names)]
    data = ablations.ablations(card.record("tuning", points))
    assert sorted(data.rows) == [16, 16, 128, 128] and set(data.gain) == {1.0, 100 / 110}
    assert data.groupby("rows").workloads.max().sum() == 3
    assert set(ablations._labels(data.variant)) == {"as shipped", "programmatic=0"}


def test_what_cannot_be_built_keeps_its_reason(tuned):
    (row,) = ablations.not_built(tuned).itertuples()
    assert row.variant == "rows=64,register_steps=12" and "shared memory" in row.reason


def test_findings_of_the_tuner(tuned):
    found = {finding["key"]: finding for finding in findings([tuned])}
    assert set(found) == {"tuning.best_gain", "tuning.worst_candidate"}
    assert found["tuning.best_gain"]["value"] == 1.0
    assert found["tuning.worst_candidate"]["value"] == pytest.approx(min(ablations.ablations(tuned).gain))
