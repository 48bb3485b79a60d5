"""The check that precedes every timing, and points that fail without ending the run."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mla_kernels.measure import points
from mla_kernels.measure.figures import flop
from mla_kernels.measure.measurements import Measurement
from mla_kernels.measure.points import CHECK_FLOP, Bound, Step, bind, check, measure, sequences_to_check
from mla_kernels.measure.timing import SAMPLE_US, Loop, calls_per_sample
from mla_kernels.measure.workloads import explicit, materialize, uniform
from mla_kernels.reference import mla_decode_reference


@pytest.fixture
def attention():
    """(inputs, Bound) of a right attention, rounded; ``spoil(index, out, lse)`` breaks it."""

    def make(workload, sets=2, spoil=lambda index, out, lse: None):
        inputs = materialize(workload, device="cpu", sets=sets)
        shared = inputs.q.new_empty(*inputs.q.shape[:3], 512)

        def call(index):
            table, causal = inputs.block_tables[index], workload.causal
            out, lse = mla_decode_reference(
                inputs.q, inputs.kv_cache, table, inputs.cache_seqlens, causal=causal
            )
            shared.copy_(out)
            lse = lse.float()
            spoil(index, shared, lse)
            return shared, lse

        return inputs, Bound([lambda i=i: call(i) for i in range(sets)], shared)

    return make


@pytest.mark.parametrize("causal", [False, True])
def test_rounding_is_all_that_a_right_result_shows(attention, causal):
    workload = explicit([0, 1, 65, 200], h_q=3, s_q=2, causal=causal)
    error = check(*attention(workload), seed=0)
    assert 0 < error.out_rel_l2 < 3e-3 and error.lse_max_abs < 1e-6
    assert error.excess("bf16") is None and error.reference == "fp64 oracle, all 4 sequences"


def test_a_wrong_last_kv_set_is_seen(attention):
    def spoil(index, out, lse):
        if index == 2:
            out[1, 0, 0] *= 1.5

    error = check(*attention(uniform(2, 100, h_q=3), sets=3, spoil=spoil), seed=0)
    assert "out relative L2 error" in error.excess("bf16")


def test_a_wrong_lse_is_seen(attention):
    error = check(*attention(uniform(2, 100, h_q=3), spoil=lambda i, out, lse: lse[1].add_(1e-3)), seed=0)
    assert error.lse_max_abs == pytest.approx(1e-3, rel=0.01) and "lse" in error.excess("bf16")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda index, out, lse: out[1].fill_(float("nan")),
        lambda index, out, lse: lse[1].fill_(float("-inf")),
        lambda index, out, lse: lse[1].fill_(float("nan")),
    ],
)
def test_what_is_not_finite_has_no_error_figure(attention, spoil):
    with pytest.raises(ArithmeticError, match="not finite"):
        check(*attention(uniform(2, 100, h_q=3), spoil=spoil), seed=0)


def test_an_output_left_unwritten_is_seen(attention):
    inputs, bound = attention(uniform(2, 100, h_q=3), sets=1)
    bound.calls[0]()
    stale = (
        bound.out.clone(),
        mla_decode_reference(inputs.q, inputs.kv_cache, inputs.block_tables[0], inputs.cache_seqlens)[1],
    )
    assert stale[0].isfinite().all()  # the right values are there before the check
    lazy = Bound([lambda: (bound.out, stale[1])], bound.out)
    with pytest.raises(ArithmeticError):
        check(inputs, lazy, seed=0)


def test_large_points_are_checked_on_a_subset():
    workload = uniform(64, 65536, h_q=128, s_q=2)
    chosen = sequences_to_check(workload, seed=1)
    assert chosen == sorted(set(chosen)) and 0 < len(chosen) < 64
    cost = flop(workload) / 64
    assert len(chosen) * cost <= CHECK_FLOP < (len(chosen) + 1) * cost
    assert chosen != sequences_to_check(workload, seed=2)
    assert sequences_to_check(explicit([0, 3, 0], h_q=1), seed=0) == [0, 1, 2]
    assert len(sequences_to_check(uniform(1, 1 << 22, h_q=512), seed=0)) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_what_cannot_be_measured_becomes_a_point_with_its_reason():
    step = Step(uniform(2, 64, h_q=16), ("mla_kernels", "block:mma"), sustain=("block:mma",))
    points = measure(step, l2_bytes=1 << 20, seed=0)
    assert [(p.implementation, p.status, p.samples_us) for p in points] == [
        ("mla_kernels", "failed", []),
        ("block:mma", "failed", []),
    ]
    assert all(point.reason for point in points)


def test_an_unknown_implementation_is_named():
    inputs = materialize(uniform(1, 64, h_q=1), device="cpu")
    with pytest.raises(ValueError, match="'block:magic' is unknown; known are mla_kernels, block:stream"):
        bind("block:magic", inputs)


@pytest.mark.parametrize("call_us", [0.0, 5.0, 40.0, 61.0, 150.0, 5000.0])
def test_a_sample_is_long_enough_and_no_longer(call_us):
    calls = calls_per_sample(call_us)
    assert calls * max(call_us, 1.0) >= SAMPLE_US
    assert calls == 1 or (calls - 1) * call_us < SAMPLE_US


def test_the_oracle_of_an_input_is_computed_once(attention, monkeypatch):
    inputs, bound = attention(uniform(2, 100, h_q=3))
    asked = []
    real = points.absorbed_oracle
    monkeypatch.setattr(points, "absorbed_oracle", lambda *a: (asked.append(a[1]), real(*a))[1])
    known = {}
    first, second = (check(inputs, bound, seed=0, known=known) for _ in range(2))
    assert asked == [0, 1] and first == second and first.out_rel_l2 > 0
    own = replace(
        bound, oracle=lambda index, rows: real(inputs, index, rows)
    )  # is asked, and leaves no trace
    known = {0: None, 1: None}
    assert check(inputs, own, seed=0, known=known) == first and known == {0: None, 1: None}


def test_what_is_known_to_be_absent_is_not_tried(monkeypatch):
    monkeypatch.setattr(points, "bind", lambda *a: pytest.fail("was tried"))
    monkeypatch.setattr(points, "materialize", lambda workload, **k: None)
    step = Step(uniform(2, 64, h_q=16), ("peer:a", "peer:b"), sustain=("peer:a",))
    (a, b) = measure(
        step, l2_bytes=1 << 20, seed=0, absent={"peer:a": "no\nlibrary", "peer:b": "x", "c": "y"}
    )
    assert (a.status, a.reason, b.reason) == ("skipped", "no library", "x")


@pytest.fixture
def bursts(monkeypatch, make_point):
    """Nothing is timed. ``seen``: names of the loops of each burst; ``wrong``: what fails, by workload."""
    seen, wrong = [], {}

    def prepare(outcome, step, name, inputs, seed, known):
        if name in wrong.get(step.workload, ()):
            raise ArithmeticError(f"{name} is wrong")
        outcome.loop, outcome.kv_sets = Loop(name, None, 1, ()), 1
        outcome.error = make_point().error

    def burst(loops, rounds):
        seen.append([loop.name for loop in loops])
        found = make_point().model_dump(include=set(Measurement.model_fields))
        return {loop.name: Measurement(**found) for loop in loops}

    monkeypatch.setattr(points._Outcome, "prepare", prepare)
    monkeypatch.setattr(points, "materialize", lambda workload, **k: None)
    monkeypatch.setattr(points, "burst", burst)
    return SimpleNamespace(seen=seen, wrong=wrong)


def test_a_step_and_the_one_beside_it_share_a_burst(bursts):
    one, other = uniform(2, 64, h_q=16), uniform(3, 64, h_q=16)
    step = Step(one, ("a", "b"), beside=Step(other, ("a",)))
    found = measure(step, l2_bytes=1 << 20, seed=0)
    assert [(p.implementation, p.workload, p.status) for p in found] == [
        ("a", one, "ok"),
        ("b", one, "ok"),
        ("a", other, "ok"),
    ]
    assert len(bursts.seen) == 1 and len(set(bursts.seen[0])) == 3


def test_what_fails_beside_a_step_leaves_the_step_alone(bursts):
    one, other = uniform(2, 64, h_q=16), uniform(3, 64, h_q=16)
    bursts.wrong[other] = ("a",)
    found = measure(Step(one, ("a",), beside=Step(other, ("a",))), l2_bytes=1 << 20, seed=0)
    assert [(p.workload, p.status) for p in found] == [(one, "ok"), (other, "failed")]
    assert "a is wrong" in found[1].reason


def test_inputs_without_room_beside_a_step_leave_the_step_alone(bursts, monkeypatch):
    one, other = uniform(2, 64, h_q=16), uniform(3, 64, h_q=16)

    def materialize(workload, **options):
        if workload == other:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(points, "materialize", materialize)
    found = measure(Step(one, ("a",), beside=Step(other, ("a", "b"))), l2_bytes=1 << 20, seed=0)
    assert [(p.workload, p.status) for p in found] == [(one, "ok"), (other, "skipped"), (other, "skipped")]
