"""Latencies as histograms, bytes of batches and churns: what is kept says what was measured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mla_kernels.measure import allocators
from mla_kernels.measure.allocations import BINS_PER_OCTAVE, Churn, Footprint, Latency
from mla_kernels.measure.records import load_record, save_record

WIDTH = 2 ** (1 / BINS_PER_OCTAVE)
times = st.lists(st.integers(0, 10**9), min_size=1, max_size=300)


@given(times, st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_the_exact_one_or_a_bin_more(nanoseconds, q):
    latency = Latency.of("pages", "allocate", nanoseconds, timer_ns=60)
    exact = np.sort(np.maximum(nanoseconds, 1))[max(0, int(np.ceil(q * len(nanoseconds))) - 1)]
    assert latency.count == len(nanoseconds)
    assert exact * 0.999999 <= 1e3 * latency.quantile_us(q) <= exact * WIDTH * 1.000001


def test_the_largest_time_is_exact():
    assert Latency.of("pages", "allocate", [100, 12345], timer_ns=1).quantile_us(1.0) == 12.345


@pytest.mark.parametrize("bins", [[], [3, 2], [2, 2], [1]])
def test_a_histogram_that_is_none_is_refused(bins):
    with pytest.raises(ValidationError, match="bins must ascend"):
        Latency(allocator="a", operation="b", bins=bins, counts=[1, 1], min_ns=1, max_ns=1, timer_ns=1)


@pytest.mark.parametrize("change", [{"min_ns": 90}, {"max_ns": 1}, {"max_ns": 10**6}])
def test_extremes_outside_their_bins_are_refused(change):
    fields = Latency.of("pages", "allocate", [100, 5000], timer_ns=60).model_dump()
    assert Latency(**fields).max_ns == 5000
    with pytest.raises(ValidationError, match="must be of the first and last"):
        Latency(**fields | change)


def test_a_churn_that_holds_less_than_is_alive_is_refused():
    with pytest.raises(ValidationError, match="held_bytes is 4 where live_bytes is 5"):
        Churn(allocator="a", events=10, live_bytes=[5, 5], held_bytes=[5, 4])


def test_lists_of_other_lengths_are_refused():
    with pytest.raises(ValidationError, match="as many"):
        Footprint(layout="paged", b=4, tokens=[1, 2], bytes=[3])
    with pytest.raises(ValidationError, match="as many"):
        Churn(allocator="a", events=10, live_bytes=[1], held_bytes=[])


def test_a_record_keeps_them(make_record, tmp_path):
    record = make_record().model_copy(
        update={
            "latencies": [Latency.of("pages", "allocate", [100, 200], 60)],
            "footprints": [Footprint(layout="paged", page_size=64, b=4, tokens=[100], bytes=[147456])],
            "churns": [Churn(allocator="pages", events=10, live_bytes=[1], held_bytes=[2])],
        }
    )
    save_record(record, tmp_path / "r.json")
    assert load_record(tmp_path / "r.json") == record


def test_lengths_are_the_chapters():
    drawn = allocators.draw_lengths(100_000, seed=3)
    assert np.mean(drawn) == pytest.approx(2048, rel=0.01) and np.std(drawn) == pytest.approx(1024, rel=0.03)
    assert min(drawn) >= 1 and max(drawn) <= allocators.LONGEST


def test_events_of_a_churn_grow_step_by_step_and_end():
    now, ends = [0] * allocators.LIVE, 0
    for row, tokens in allocators.churn_events(20_000, seed=5):
        if now[row] == 0:
            assert tokens > 0
        else:
            assert tokens in (0, now[row] + 64)
            ends += tokens == 0
        now[row] = tokens
    assert ends > 100


def test_pages_hold_the_latents_and_less_than_a_page_more_each():
    churn = allocators.churn_of_pages(5_000, seed=5, samples=50)
    most = allocators.LIVE * 64 * allocators.BYTES_PER_TOKEN
    assert len(churn.live_bytes) == 50
    for live, held in zip(churn.live_bytes, churn.held_bytes, strict=True):
        assert live <= held < live + most
