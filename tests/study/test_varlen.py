"""Tables and figures of lengths that differ: from planted times."""

import matplotlib

matplotlib.use("Agg")

import pytest

from mla_kernels.measure.experiments import varlen as experiment
from mla_kernels.measure.experiments.varlen import CHAPTER_BATCHES
from mla_kernels.measure.records import Host
from mla_kernels.measure.workloads import explicit, lognormal, spread_evenly
from mla_kernels.study import varlen

TIMES = {
    "mla_kernels": 10.0,
    "alternative:padded": 40.0,
    "alternative:loop": 30.0,
    "alternative:padded_kernel": 15.0,
    "alternative:kernel_loop": 50.0,
}


def host(us):
    return Host(call_us=[us], plan_us=[])


@pytest.fixture
def record(card):
    """The chapter's second batch and a log-normal one, each with its even one; a peer at the first."""
    points = []
    for workload in (explicit(CHAPTER_BATCHES[1], h_q=16), lognormal(64, 2048, 1024, h_q=128)):
        points += [card.point(name, workload, us=us, host=host(7 * us)) for name, us in TIMES.items()]
        points.append(card.point("mla_kernels", spread_evenly(workload), us=8.0))
    points.append(card.point("peer:fa3", points[0].workload, us=12.0, host=host(1e6)))
    return card.record("varlen", points)


def test_a_row_a_batch_with_its_ratios(record):
    data = varlen.table(record)
    assert data.batch.tolist() == ["512 … 4096, b 4", "lognormal, b 64"]
    ratios = data[list(varlen.NAMES)].to_dict("records")
    assert ratios == [{"padded": 4.0, "loop": 3.0, "padded_kernel": 1.5, "kernel_loop": 5.0}] * 2
    assert data.stretch[0] == 4096 / 1920 and data.penalty.tolist() == pytest.approx([0.25] * 2)


def test_what_was_not_timed_is_left_empty(card):
    alone = card.record("varlen", [card.point("mla_kernels", explicit([5, 9], h_q=16))])
    (row,) = varlen.table(alone).to_dict("records")
    assert all(row[name] != row[name] for name in (*varlen.NAMES, "penalty")), "NaN"
    assert varlen.against_peers(alone).empty and varlen.against_chapter(alone, {}).empty


def test_every_batch_of_the_experiment_has_a_name_of_its_own():
    names = [varlen.in_words(workload) for _, workload in experiment.workloads(16, "full")]
    assert len(set(names)) == len(names)
    assert [name.split(",")[0] for name in names[-2:]] == ["flat to 8192", "Zipf"]
    assert varlen.in_words(explicit(range(1, 10), h_q=16)) == "listed, mean 5, b 9"


def test_against_the_chapter(record):
    said = {"512 … 4096, b 4": (4.1, 1.66, 0.91), "4 × 1024": (2.8, 1.5, 0.87)}
    (row,) = varlen.against_chapter(record, said).to_dict("records")
    assert row["ms"] == 0.01 and row["speed-up"] == 3.0, "over the faster of the two ways in PyTorch"
    assert row["its GB/s"] == pytest.approx(7680 * 1152 / 4.1e-3 / 1e9)
    assert row["GB/s"] == pytest.approx(7680 * 1152 / 10e-6 / 1e9)
    assert (row["filled, pages"], row["filled, padded"]) == (1.0, 7680 / (4 * 4096))


def test_pages_that_are_not_full_are_counted_whole(card):
    uneven = card.record("varlen", [card.point("mla_kernels", explicit([65, 63], h_q=16))])
    (row,) = varlen.against_chapter(uneven, {"63 … 65, b 2": (1.0, 1.0, 1.0)}).to_dict("records")
    assert row["filled, pages"] == 128 / 192 and row["filled, padded"] == 128 / 130


def test_a_peer_is_compared_where_it_was_timed(record):
    (row,) = varlen.against_peers(record).to_dict("records")
    assert (row["batch"], row["peer"], row["ratio"]) == ("512 … 4096, b 4", "FA3 (q_v)", 1.2)


def test_host_times_are_of_the_alternatives(record):
    data = varlen.host_times(record).set_index(["b", "way"]).host_us
    assert data.to_dict() == {
        (b, name.removeprefix("alternative:")): 7 * us for b in (4, 64) for name, us in TIMES.items()
    }


@pytest.mark.parametrize("name", ["speedups", "padding", "batches", "penalty", "host"])
def test_figures_draw_what_they_return(name, record, shown):
    data = getattr(varlen, f"plot_{name}")(record)
    assert len(data) == (10 if name == "host" else 2)
    assert len(shown) == 1 and shown[0].stat().st_size < 150 * 1024


def test_what_padding_would_fill(record, shown, monkeypatch):
    drawn = {}
    monkeypatch.setattr(varlen.style, "show", lambda figure, _: drawn.update(_areas(figure.axes[0])))
    data = varlen.plot_batches(record).set_index("batch")
    assert data.filled["512 … 4096, b 4"] == pytest.approx(7680 / (4 * 4096))
    assert drawn == pytest.approx(data.filled.to_dict()), "the area under a curve is what is filled"


def _areas(axes):
    steps = {patch.get_label(): patch.get_data() for patch in axes.patches}
    return {name: (step.values * (step.edges[1:] - step.edges[:-1])).sum() for name, step in steps.items()}
