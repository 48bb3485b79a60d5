"""Figures and tables of the paged cache: from planted numbers, and from a small trace."""

import math

import matplotlib

matplotlib.use("Agg")

import pytest

from mla_kernels.measure.allocations import Churn, Footprint, Latency
from mla_kernels.measure.workloads import uniform
from mla_kernels.serving import chats
from mla_kernels.study import paging


@pytest.fixture
def record(card):
    """One batch of 1000 tokens, one latency, two churns of ten samples."""
    base = uniform(128, 4096, h_q=16)
    points = [
        card.point("mla_kernels", base.model_copy(update={"page_size": size}), us=us)
        for size, us in {64: 100.0, 1: 200.0}.items()
    ]
    bytes_of = {
        ("paged", 64): 1280,
        ("padded", None): 2560,
        ("maximum", None): 12800,
        ("allocated", None): 1600,
    }
    live, samples = [100] * 9 + [200], 10
    update = {
        "footprints": [
            Footprint(layout=layout, page_size=size, b=4, tokens=[1000], bytes=[1152 * n])
            for (layout, size), n in bytes_of.items()
        ],
        "latencies": [
            Latency.of("PageAllocator", "allocate 1 pages", [1000] * 99 + [8000], 60),
            Latency.of("PageAllocator", "free 1 pages", [500], 60),
        ],
        "churns": [
            Churn(allocator="pages", events=1000, live_bytes=live, held_bytes=[110] * 9 + [210]),
            Churn(allocator="torch", events=1000, live_bytes=live, held_bytes=[300] * samples),
        ],
    }
    return card.record("paging", points).model_copy(update=update)


def test_pages_against_pages_of_64(record, shown):
    data = paging.plot_page_sizes(record).set_index("page_size")
    assert data.ratio.to_dict() == {64: 1.0, 1: 0.5} and len(shown) == 1


def test_savings_are_of_the_bytes_of_the_other_layout(record, shown):
    (row,) = paging.plot_savings(record, chapter=0.42).to_dict("records")
    assert row["pages of 64"] == 0.5 and row["against the longest of a model"] == 0.9
    assert row["waste of pages of 64"] == 1 - 1000 / 1280 and row["a tensor each, waste"] == 1 - 1000 / 1600
    assert len(shown) == 1


def test_the_error_of_a_saving_is_that_of_the_mean(record):
    def of(layout, page_size, *bytes):
        return Footprint(layout=layout, page_size=page_size, b=4, tokens=[1000] * 4, bytes=bytes)

    footprints = [of("paged", 64, 60, 80, 60, 80), of("padded", None, 100, 100, 100, 100)]
    footprints += [of("maximum", None, *[900] * 4), of("allocated", None, *[70] * 4)]
    (row,) = paging.savings(record.model_copy(update={"footprints": footprints})).to_dict("records")
    assert row["pages of 64"] == pytest.approx(0.3)
    assert row["± of pages of 64"] == pytest.approx((0.04 / 3) ** 0.5 / 2)
    (alone,) = paging.savings(record).to_dict("records")
    assert math.isnan(alone["± of pages of 64"])


def test_padding_wastes_what_is_missing_to_the_longest(monkeypatch):
    monkeypatch.setattr(paging, "draw_lengths", lambda n, seed: [100, 50, 100, 100][:n])
    assert paging.padding_waste(2, batches=2) == 0.125  # a quarter of the first, nothing of the second
    monkeypatch.undo()
    wasted = [paging.padding_waste(b, batches=20_000) for b in (1, 4, 8, 16)]
    assert wasted[0] == 0 and wasted == sorted(wasted) and wasted[-1] < 0.6


def test_times_of_freeing_are_listed_and_not_drawn(record, shown):
    listed, drawn = paging.latencies(record), paging.plot_latencies(record, {"paged": 2.3, "malloc": 15.7})
    assert listed.operation.tolist() == ["allocate 1 pages", "free 1 pages"] and len(drawn) == 1
    assert drawn.p99[0] == pytest.approx(1.0, rel=0.03) and drawn["max"][0] == 8.0


def test_overheads_at_a_moment_and_at_the_peak(record, shown):
    simulated = Churn(allocator="arena", events=1000, live_bytes=[100] * 10, held_bytes=[140] * 10)
    data = paging.plot_churn(record, simulated)
    assert set(data.event) == set(range(200, 1001, 100)), "the first tenth fills the rows"
    found = paging.overheads(data).set_index("allocator")
    assert found.index.tolist() == ["pages", "torch", "arena"]
    assert found["median"].tolist() == pytest.approx([0.1, 2.0, 0.4])
    assert found["peak"].tolist() == pytest.approx([0.05, 0.5, 0.4])
    assert len(shown) == 1


def test_hits_of_every_deployment_and_of_other_traces(shown):
    trace, shorter = chats(60, 5.0, seed=2), chats(60, 5.0, seed=2, mean_turns=1.0)
    data = paging.hits(trace)
    assert len(data) == 6 and data["evicted pages"].gt(0).tolist() == [False] * 4 + [True, False]
    total = sum(request.context_tokens for request in trace)
    assert (data["prefill saved, tokens"] == (data["hit rate"] * total).round()).all()
    varied = paging.hits_by_trace(data, {"one turn": shorter})
    assert varied["this trace"].tolist() == data["hit rate"].tolist()
    assert varied["one turn"].tolist() == paging.hits(shorter)["hit rate"].tolist()
    assert (varied["one turn"] < varied["this trace"]).any()
    paging.plot_hits(data, {7: 0.94, 30: 0.89, 70: 0.85}, "simulated")
    assert len(shown) == 1
