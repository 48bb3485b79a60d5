"""FLOP and bytes against a count of every element, the derived figures against arithmetic done by hand."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_kernels.measure import figures
from mla_kernels.measure.workloads import explicit, materialize


@pytest.mark.parametrize(("lengths", "h_q", "s_q"), [((3, 0, 65), 3, 2), ((1,), 1, 1), ((64, 128), 8, 4)])
def test_flop_and_bytes_by_counting(lengths, h_q, s_q):
    workload = explicit(lengths, h_q=h_q, s_q=s_q)
    inputs = materialize(workload, device="cpu", sets=2)
    multiply_adds, lines = 0, set()
    for sequence, length in enumerate(lengths):
        for token in range(length):
            page = int(inputs.block_tables[1, sequence, token // 64])
            lines.add((page, token % 64))
            for _row in range(s_q * h_q):
                multiply_adds += inputs.kv_cache.shape[-1]  # q · k
                multiply_adds += 512  # p · v
    assert figures.flop(workload) == 2 * multiply_adds
    line_bytes = inputs.kv_cache[0, 0].nbytes
    assert figures.kv_bytes(workload) == len(lines) * line_bytes
    out = inputs.q[..., :512].contiguous()
    assert figures.moved_bytes(workload) == len(lines) * line_bytes + inputs.q.nbytes + out.nbytes


def test_the_design_page_agrees():
    # h_q 128, b 128, kv 4096: 251 µs was 582 TFLOP/s; h_q 16: 154 µs was 3.94 TB/s
    big = explicit([4096] * 128, h_q=128)
    assert figures.flop(big) / 251e-6 / 1e12 == pytest.approx(582, rel=2e-3)
    few = explicit([4096] * 128, h_q=16)
    assert figures.moved_bytes(few) / 154e-6 / 1e12 == pytest.approx(3.94, rel=5e-3)


def test_rates_of_blocks(make_point):
    times = {"us": 50.0, "h_q": 64}
    flop, kv = 2 * 64 * 8192 * 1088, 8192 * 1152
    stream, mma, skeleton = (make_point(f"block:{kind}", **times) for kind in ("stream", "mma", "skeleton"))
    assert [figures.point_flop(p) for p in (stream, mma, skeleton)] == [0, flop, flop]
    assert [figures.point_bytes(p) for p in (stream, mma, skeleton)] == [kv, 0, kv]
    assert figures.tflops(mma) == pytest.approx(flop / 50e-6 / 1e12)
    assert figures.tb_s(stream) == pytest.approx(kv / 50e-6 / 1e12)


@given(n=st.integers(1, 60), level=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_interval_is_the_narrowest_that_covers(n, level, make_point):
    point = make_point(samples_us=[float(i + 1) for i in range(n)])
    low, high = figures.interval_us(point, level)
    rank = int(low) - 1
    assert high == n - rank

    def coverage(rank):  # P(samples[rank] <= median <= samples[n - 1 - rank]), all orders equally likely
        return sum(math.comb(n, k) for k in range(rank + 1, n - rank)) / 2**n

    assert rank == 0 or coverage(rank) >= level
    assert coverage(rank + 1) < level


def test_median_of_a_burst_and_mean_of_a_window(make_point):
    assert make_point(samples_us=[3.0, 1.0, 100.0]).per_call_us == 3.0
    assert make_point(us=250.0, power_w=600.0).per_call_us == pytest.approx(250.0)


def test_joules_per_token(make_point):
    point = make_point(us=250.0, power_w=600.0, lengths=(4096,) * 4, s_q=2)
    assert figures.joules_per_token(point) == pytest.approx(600 * 250e-6 / (4 * 2))
    assert figures.joules_per_token(make_point()) is None
    sampled = point.sustained.model_copy(update={"energy_j": None, "power_samples_w": [500.0, 700.0]})
    assert figures.joules_per_token(point.model_copy(update={"sustained": sampled})) == pytest.approx(
        600 * 250e-6 / 8
    )
    unread = sampled.model_copy(update={"power_samples_w": []})
    assert figures.joules_per_token(point.model_copy(update={"sustained": unread})) is None


def test_shares_and_floor_use_the_ceilings_of_the_run(make_record, make_point):
    record = make_record()  # 4 TB/s and 800 TFLOP/s
    point = make_point(us=100.0)
    assert figures.bandwidth_share(record, point) == pytest.approx(figures.tb_s(point) / 4.0)
    assert figures.compute_share(record, point) == pytest.approx(figures.tflops(point) / 800.0)
    few, many = explicit([4096], h_q=1), explicit([4096], h_q=1024)
    assert figures.floor_us(record, few) == pytest.approx(figures.moved_bytes(few) / 4e6)
    assert figures.floor_us(record, many) == pytest.approx(figures.flop(many) / 800e6)


def test_a_missing_ceiling_names_those_there_are(make_record):
    with pytest.raises(LookupError, match=r"no sustained ceiling 'hbm_read'.*hbm_read \(burst\)"):
        figures.find_ceiling(make_record(), figures.HBM_READ, "sustained")


def test_counterpart_matches_workload_mode_and_rotation(make_record, make_point):
    ours = make_point()
    others = [
        make_point("block:stream", kv_sets=1),
        make_point("block:stream", h_q=32),
        make_point("block:stream", power_w=500.0),
        make_point("block:stream", status="failed", reason="x", samples_us=[]),
    ]
    assert figures.counterpart(make_record(points=[ours, *others]), ours, "block:stream") is None
    match = make_point("block:stream", us=80.0)
    for order in itertools.islice(itertools.permutations([ours, match, *others]), 0, None, 97):
        found = figures.counterpart(make_record(points=list(order)), ours, "block:stream")
        assert found == match
    assert figures.speed_ratio(ours, match) == pytest.approx(0.8)


def test_host_time_is_the_median_of_its_samples(make_point):
    assert figures.host_us(make_point()) is None
    assert figures.host_us(make_point(host={"call_us": [9.0, 30.0, 10.0]})) == 10.0


def test_a_label_names_the_dtype_where_it_is_not_the_usual(make_point):
    point = make_point()
    half = point.workload.model_copy(update={"dtype": "fp16"})
    assert figures.label(point).endswith("kv 4096")
    assert figures.label(point.model_copy(update={"workload": half})).endswith("kv 4096, fp16")
