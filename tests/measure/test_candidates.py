"""Variants as implementations: names, what cannot be built, and the table that their times speak for."""

import pytest

from mla_kernels import tuning
from mla_kernels.compiler import CompileError
from mla_kernels.measure import __main__ as command
from mla_kernels.measure import candidates, experiment, points
from mla_kernels.measure.candidates import best_of, best_table, name_of, speeds, tuning_of
from mla_kernels.measure.experiments import tuning as plan
from mla_kernels.measure.points import Step
from mla_kernels.measure.records import RecordError, Variant, load_record, save_record
from mla_kernels.measure.workloads import materialize, uniform
from mla_kernels.tuning import ROWS, SHIPPED, TuningError, TuningTable

AHEAD, SHIPPED_64 = name_of("ahead_boxes=1", rows=64), name_of(rows=64)


@pytest.fixture
def timed(make_point):
    """Points of {(implementation, h_q): µs}, each at two workloads."""

    def make(times):
        return [
            make_point(name, h_q=h_q, us=us * factor, lengths=(length,))
            for (name, h_q), us in times.items()
            for length, factor in ((4096, 1.0), (16384, 4.0))
        ]

    return make


@pytest.fixture
def shipped(timed):
    """The shipped variants, 100 µs everywhere, and what is added."""
    base = {(name_of(rows=candidates.shipped_rows(h)), h): 100.0 for h in plan.FULL_HEADS}
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


def test_speeds_are_over_the_shipped_variant_of_those_query_rows(shipped):
    found = speeds(shipped(more={(AHEAD, 64): 80.0, (AHEAD, 128): 125.0, (name_of(rows=32), 64): 50.0}))
    assert sorted(found[AHEAD].values()) == [0.8, 0.8, 1.25, 1.25]
    assert list(found[name_of(rows=32)].values()) == [1, 1, 2, 2]
    assert speeds([]) == {}


def test_the_best_is_fastest_over_all_that_it_would_serve(shipped):
    other = name_of("item_units=1", rows=64)
    times = {(AHEAD, 64): 85.0, (AHEAD, 128): 110.0, (other, 64): 98.0, (other, 128): 90.0}
    assert best_of(shipped(more=times), 64) == (other, pytest.approx((1 / 0.98 / 0.9) ** 0.5))
    del times[other, 128]  # timed at half of them
    assert best_of(shipped(more=times), 64)[0] == AHEAD


def test_what_gains_less_than_noise_is_not_taken(shipped):
    assert best_of(shipped(more={(AHEAD, 64): 99.5, (AHEAD, 128): 99.5}), 64) == (SHIPPED_64, 1.0)
    assert best_of([], 64) == (SHIPPED_64, 1.0)


def test_the_table_without_a_gain_is_the_shipped_one(shipped):
    assert best_table(shipped()) == SHIPPED == best_table([])


def test_the_table_takes_variants_and_thresholds_that_gain(shipped):
    table = best_table(shipped(more={(AHEAD, 64): 90.0, (AHEAD, 128): 90.0, (name_of(rows=16), 32): 80.0}))
    assert [limit for limit, _ in table.entries] == [8, 32, None]
    assert [tuning.rows for _, tuning in table.entries] == [8, 16, 64]
    assert table.serving(64) == tuning_of(AHEAD)


@pytest.mark.parametrize("better", [(8, 16), (16, 8), (32, 64), (64, 32), (16, 64), (32, 8)])
def test_whatever_gains_the_table_is_one(shipped, better):
    limit, rows = better
    table = best_table(shipped(more={(name_of(rows=rows), limit): 10.0}))
    assert isinstance(table, TuningTable) and table.entries[-1][0] is None
    assert table.serving(limit).rows == (rows if rows > limit or limit == 64 else table.serving(limit).rows)
    assert table.serving(128).rows == 64


def test_a_record_keeps_the_table_and_the_operator_reads_it(tmp_path, make_record, timed):
    table = TuningTable(((20, SHIPPED.of_rows(16)), (None, tuning_of(AHEAD))))
    record = make_record(tuning=[Variant(**entry) for entry in table.to_json()])
    save_record(record, tmp_path / "tuning.json")
    assert tuning.load_table(tmp_path / "tuning.json") == table
    assert candidates.table_of(load_record(tmp_path / "tuning.json")) == table


def test_a_record_with_a_table_that_cannot_be_is_refused(tmp_path, make_record):
    entries = SHIPPED.to_json()
    entries[-1]["group_slots"] = 2
    broken = make_record().model_copy(update={"tuning": [Variant(**entry) for entry in entries]})
    with pytest.raises(RecordError, match="group_slots is 2, must be at least 3"):
        save_record(broken, tmp_path / "tuning.json")


def test_the_plan_has_the_shipped_variant_first_and_ablations():
    for scope in ("full", "live"):
        for step in plan.steps(scope):
            rows = candidates.shipped_rows(step.workload.h_q)
            assert step.implementations[0] == name_of(rows=rows)
            assert name_of("programmatic=0", rows=rows) in step.implementations
            assert len(step.implementations) >= 5
    full = list(plan.steps("full"))
    assert {candidates.rows_of(name) for step in full for name in step.implementations} == set(ROWS)
    assert len(full) == 15 and sum(len(step.implementations) for step in full) < 160
    assert len(list(plan.steps("live"))) == 3


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
    assert "any number of query rows: rows=64 ahead_boxes=1" in lines
    assert tuning.load_table(tmp_path / "tuning.json").serving(64) == tuning_of(AHEAD)
