"""What measures prefill: counts, inputs, the check before a timing, the plan of the experiment."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_kernels.measure import figures, points, prefill_points
from mla_kernels.measure.calls import PrefillWorkload
from mla_kernels.measure.experiments import prefill as experiment
from mla_kernels.measure.peers import PREFILL_PEERS
from mla_kernels.measure.points import Step, measure
from mla_kernels.measure.prefill_candidates import prefill_configs, prefill_tuning_of, prepare_prefill
from mla_kernels.measure.prefill_inputs import (
    evenly,
    materialize_prefill,
    prefill,
    prefill_lognormal,
    prefill_sets,
)
from mla_kernels.measure.records import Point, load_record, save_record
from mla_kernels.prefill_tuning import VARIANTS, PrefillTuningError

MATH = PREFILL_PEERS["prefill_math"]
SMALL = prefill(2, 33, 4, (64, 64), causal=True)
RAGGED = prefill_lognormal(3, 40, 2, (192, 128), causal=True, dtype="fp16")


@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4),
    causal=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_visible_pairs_are_those_of_the_mask(lengths, causal):
    queries, keys = zip(*lengths, strict=True)
    workload = PrefillWorkload(
        b=len(lengths), h_q=6, h_kv=2, d_qk=192, d_v=128, causal=causal, ragged=True,
        lengths_kind="explicit", mean_len=0, lengths_q=queries, lengths_k=keys,
    )  # fmt: skip
    seen = sum(
        sum(not causal or j <= i + s_k - s_q for i in range(s_q) for j in range(s_k)) for s_q, s_k in lengths
    )
    assert figures.visible_pairs(workload) == seen
    assert figures.flop(workload) == 2 * seen * 6 * (192 + 128)
    assert figures.kv_bytes(workload) == 2 * sum(keys) * 2 * 320
    assert figures.moved_bytes(workload) - figures.kv_bytes(workload) == 2 * sum(queries) * 6 * 320
    assert figures.tokens(workload) == sum(queries)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"lengths_q": (33,)}, "lengths_q holds 1"),
        ({"lengths_k": (33, 34)}, "ragged"),
        ({"h_kv": 3}, "multiple of h_kv"),
    ],
)
def test_a_workload_that_no_call_can_have_is_refused(fields, found):
    with pytest.raises(ValueError, match=found):
        PrefillWorkload.model_validate(SMALL.model_dump() | fields)


def test_lengths_have_the_moments_asked_for_and_their_even_batch_as_many_tokens():
    drawn = prefill_lognormal(4000, 2048, 8, (64, 64))
    lengths = torch.tensor(drawn.lengths_q, dtype=torch.float64)
    assert lengths.mean().item() == pytest.approx(2048, rel=0.03)
    assert lengths.std().item() == pytest.approx(1024, rel=0.06)
    even = evenly(drawn)
    assert not even.ragged and abs(sum(even.lengths_q) / sum(drawn.lengths_q) - 1) < 1e-3


def test_sets_total_over_four_times_the_l2():
    workload = prefill(1, 512, 8, (64, 64))
    of_one = 3 * 512 * 8 * 64 * 2
    assert prefill_sets(workload, 50 << 20) * of_one > 4 * (50 << 20)
    assert prefill_sets(prefill(16, 16384, 128, (128, 128)), 50 << 20) == 1


@pytest.mark.parametrize("workload", [SMALL, RAGGED, SMALL.model_copy(update={"causal": False})])
def test_plain_pytorch_agrees_with_the_oracle(workload):
    inputs = materialize_prefill(workload, device="cpu", sets=2)
    error = prefill_points.check(inputs, MATH.bind(inputs), seed=0)
    assert 0 < error.out_rel_l2 < (6e-3 if workload.dtype == "bf16" else 8e-4)
    assert error.lse_max_abs is None and error.reference.endswith("all")


def test_queries_over_longer_keys_are_aligned_at_the_end():
    workload = prefill(1, 40, 2, (64, 64), s_q=7, causal=True)
    inputs = materialize_prefill(workload, device="cpu")
    assert prefill_points.check(inputs, MATH.bind(inputs), seed=0).out_rel_l2 < 6e-3


@pytest.mark.parametrize("workload", [SMALL, RAGGED])
@pytest.mark.parametrize("index", [0, 1])
def test_one_wrong_head_of_one_set_is_seen(workload, index):
    inputs = materialize_prefill(workload, device="cpu", sets=2)
    right = MATH.bind(inputs)

    def wrong():
        right.calls[index]()
        right.out[..., -1, :] *= 1.2
        return right.out

    calls = [*right.calls]
    calls[index] = wrong
    assert prefill_points.check(inputs, replace(right, calls=calls), seed=0).out_rel_l2 > 0.02


def test_an_output_left_unwritten_is_seen():
    inputs = materialize_prefill(SMALL, device="cpu")
    right = MATH.bind(inputs)
    right.calls[0]()
    with pytest.raises(ArithmeticError, match="not finite"):
        prefill_points.check(inputs, replace(right, calls=[lambda: right.out]), seed=0)


def test_large_points_are_checked_on_a_sample():
    workload = prefill(4, 16384, 32, (128, 128))
    chosen = prefill_points.parts_to_check(workload, seed=1)
    assert chosen == sorted(set(chosen)) and 0 < len(chosen) < 4 * 32
    assert chosen != prefill_points.parts_to_check(workload, seed=2)
    assert len(prefill_points.parts_to_check(SMALL, seed=0)) == 2 * 4


def test_scores_that_do_not_fit_are_a_reason():
    workload = prefill(1, 16384, 32, (64, 64))
    inputs = replace(materialize_prefill(SMALL, device="cpu"), workload=workload)
    with pytest.raises(NotImplementedError, match=r"8,589,934,592 scores would take 103 GB"):
        MATH.bind(inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_what_cannot_be_measured_becomes_a_point_with_its_reason():
    found = measure(Step(SMALL, ("mla_kernels", "peer:prefill_math")), l2_bytes=1 << 20, seed=0)
    assert [(p.workload, p.status) for p in found] == [(SMALL, "failed")] * 2 and found[0].reason


def test_a_prefill_point_survives_the_disk(tmp_path, make_record, make_point):
    error = {"out_rel_l2": 1e-4, "lse_max_abs": 1e-4, "reference": "oracle"}  # of LSE more than decode may
    fields = make_point().model_dump() | {"error": error}
    kept = [Point.model_validate(fields | {"workload": w}) for w in (SMALL, RAGGED)]
    with pytest.raises(ValueError, match="lse absolute error"):
        Point.model_validate(fields)
    record = make_record(experiment="prefill", points=[make_point(), *kept])
    save_record(record, tmp_path / "prefill.json")
    loaded = load_record(tmp_path / "prefill.json")
    assert loaded == record
    assert [type(p.workload).__name__ for p in loaded.points] == ["Workload", *["PrefillWorkload"] * 2]
    assert figures.label(loaded.points[1]) == "burst, b 2, s 33, h 4, d 64, causal"
    words = "burst, b 3, s lognormal 40±20, h 2, d 192/128, causal, ragged, fp16"
    assert figures.label(loaded.points[2]) == words


def test_variants_are_the_shipped_one_but_for_what_they_name():
    tuning = prefill_tuning_of("mla_kernels[stages=3]", SMALL)
    assert tuning == replace(VARIANTS[64, 64], stages=3)
    with pytest.raises(PrefillTuningError, match="'magic=1' must be one of head_dim"):
        prefill_tuning_of("mla_kernels[magic=1]", SMALL)
    named = [("mla_kernels", SMALL), ("mla_kernels[stages=99]", SMALL), ("mla_kernels[magic=1]", RAGGED)]
    assert prefill_configs(named) == []
    reasons = prepare_prefill(named)
    assert set(reasons) == {("bf16", "mla_kernels[stages=99]"), ("fp16", "mla_kernels[magic=1]")}


def test_variants_that_are_timed_differ_from_what_ships():
    for name in experiment.variants():
        assert prefill_tuning_of(name, SMALL) != VARIANTS[64, 64]


def test_the_whole_grid_is_the_chapters():
    every = list(experiment.whole())
    assert len(every) == len(set(map(str, every))) == 2 * 5 * 6 * 5 * 2 * 2 * 2


def test_any_two_values_of_two_axes_meet():
    chosen = experiment.covering()
    assert len(chosen) < 40
    for one, other in itertools.combinations(experiment.AXES, 2):
        met = {(c[one], c[other]) for c in chosen}
        assert met == set(itertools.product(experiment.AXES[one], experiment.AXES[other]))
    forms = {(c["dtype"], c["d"], c["causal"], c["ragged"]) for c in chosen}
    assert len(forms) == 2**4


def test_ragged_batches_have_their_even_ones_beside_them():
    steps = list(experiment.steps("full"))
    ragged = [step for step in steps if step.workload.ragged]
    assert len(ragged) >= 15 and all(step.beside == Step(evenly(step.workload)) for step in ragged)
    assert not any(step.beside for step in steps if not step.workload.ragged)
    rows = [step for step in steps if step.rounds == experiment.CHAPTER_REPEATS]
    assert [(s.workload.b, s.workload.mean_len) for s in rows] == list(experiment.CHAPTER_ROWS)
    assert all(points.DECODE in step.implementations for step in steps)
