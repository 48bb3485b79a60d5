"""Findings, tables and figures of prefill: from planted times."""

import pytest

from mla_kernels.measure import figures
from mla_kernels.measure.prefill_inputs import evenly, prefill, prefill_lognormal
from mla_kernels.measure.records import Accuracy, Memory
from mla_kernels.study import prefill as study
from mla_kernels.study.findings import findings

OURS, FA3, CUDNN, FA2, MATH = study.NAMES
PLAIN, POLY, TURNS = (f"{OURS}[{change}]" for change in ("polynomials=0", "polynomials=2", "turns=0"))
ROW = prefill(1, 4096, 32, (64, 64))
LONG = prefill(1, 16384, 128, (192, 128), causal=True)
SPEEDS = {OURS: 1.2, POLY: 1.0, TURNS: 1.14, FA3: 1.0, CUDNN: 0.8, FA2: 0.6, MATH: 0.1}  # of 500 TFLOP/s


def us(workload, speed):
    return figures.flop(workload) / (speed * 500) / 1e6


def some(card, workload, speeds, mode="burst", **fields):
    return [card.point(name, workload, mode, 3, us=us(workload, v), **fields) for name, v in speeds.items()]


@pytest.fixture(scope="module")
def record(card):
    """Every axis that the figures need; ours 1.2 times FA3 at d 64, 0.9 at d 128, 1.5 at MLA's."""
    memory = Memory(cache_bytes=1000, workspace_bytes=10**9)
    points = []
    for s in (1024, 2048, 4096, 8192):
        for causal in (False, True):
            shape = prefill(1, s, 32, (64, 64), causal=causal)
            points += some(card, shape, SPEEDS, memory=memory)
            shape = prefill(1, s, 32, (128, 128), causal=causal)
            points += some(card, shape, {OURS: 0.9, FA3: 1.0, FA2: 0.6})
    points += some(card, LONG, {OURS: 1.5, CUDNN: 1.0}) + some(card, ROW, {OURS: 1.2, FA3: 1.0}, "sustained")
    points += some(card, prefill(1, 16384, 8, (128, 128), s_q=1024, causal=True), {OURS: 0.5, FA3: 1.0})
    ragged = prefill_lognormal(4, 1024, 8, (64, 64))
    points += some(card, ragged, {OURS: 1.1, FA3: 1.0}) + some(card, evenly(ragged), {OURS: 1.3})
    return card.record("prefill", points)


def test_findings_are_the_worst_of_their_points(record):
    found = {f["key"]: f["value"] for f in findings([record])}
    assert found["prefill.d64_vs_best"] == pytest.approx(1.1)
    assert found["prefill.d128_vs_best"] == pytest.approx(0.9) == found["prefill.worst_ratio"]
    assert found["prefill.mla_vs_best"] == pytest.approx(1.5)
    assert found["prefill.mla_tflops"] == pytest.approx(750)
    assert found["prefill.chunk_vs_best"] == pytest.approx(0.5), "not of the grid"
    assert found["prefill.sustained_vs_best"] == pytest.approx(1.2)
    assert found["prefill.varlen_fraction"] == pytest.approx(1.1 / 1.3)
    assert found["prefill.polynomial_gain"] == pytest.approx(1 / 1.2)
    assert found["prefill.error_vs_torch"] == pytest.approx(1e-3 / 1.1e-3)
    assert found["prefill.energy_vs_best"] < 1
    assert "prefill.d256_vs_best" not in found, "was not measured"
    assert not any(key.startswith("decode.") for key in found)


def test_error_is_compared_at_the_same_inputs(card):
    large = Accuracy(out_rel_l2=2.9e-3, lse_max_abs=1e-6, reference="oracle")
    points = [card.point(OURS, ROW, kv_sets=3, error=large), card.point(MATH, ROW, kv_sets=3)]
    points.append(card.point(MATH, LONG, kv_sets=3))
    found = {f["key"]: f["value"] for f in findings([card.record("prefill", points)])}
    assert found["prefill.error_vs_torch"] == pytest.approx(2.9 / 1.1)


def test_a_row_a_call_with_every_rate(record):
    data = study.table(record).set_index("call")
    row = data.loc["b 1, s 4096, h 32, d 64"]
    assert [row[name] for name in study.NAMES.values()] == pytest.approx([600, 500, 400, 300, 50])
    assert (row.best, row.ratio) == ("FA3", pytest.approx(1.2))
    assert data.loc["b 1, s 16384, h 128, d 192/128, causal", "best"] == "cuDNN"
    rows = study.summary(record).set_index("d")
    assert rows.loc["128"].tolist()[0] == 8 and rows["ahead at"].to_dict() == {
        "64": 9,
        "128": 0,
        "192/128": 1,
    }
    assert study.worst(record, 1).call.tolist() == ["b 1, s 1024 over 16384, h 8, d 128, causal"]


def test_against_the_chapter(record):
    said = {(1, 4096): (658.7, 12.8, 33.6), (4, 1024): (612.3, 3.1, 8.4)}
    (row,) = study.against_chapter(record, said).to_dict("records")
    assert row["its FLOP / ms"] == pytest.approx(4 * 4096**2 * 32 * 64 / 12.8e-3 / 1e12)
    assert (row["mla_prefill"], row["PyTorch"]) == pytest.approx((600, 50))
    assert row["GB"] == pytest.approx(1 + 4 * 4096 * 32 * 64 * 2 / 1e9)
    (row,) = study.bandwidths(record, {(1, 4096, 32): 3000.0, (9, 9, 9): 1.0}).to_dict("records")
    assert row["GB/s"] == pytest.approx(4 * 4096 * 32 * 64 * 2 / row["us"] / 1e3)


def test_under_load(record):
    data = study.sustained(record)
    assert data.name.tolist() == ["mla_prefill", "FA3"]
    assert data["mJ per token"].tolist() == pytest.approx(
        [1e3 * w * us(ROW, v) / 1e6 / 4096 for w, v in zip(data.W, (1.2, 1.0), strict=True)]
    )


@pytest.mark.parametrize(
    ("draw", "rows"),
    [
        (lambda r: study.plot_chapter(study.against_chapter(r, {(1, 4096): (658.7, 12.8, 33.6)}), r), 1),
        (lambda r: study.plot_lengths(r, causal=True), 4 * (5 + 3)),
        (study.plot_ratios, 18),
        (study.plot_varlen, 1),
        (study.plot_variants, 16),
        (study.plot_energy, 2),
        (lambda r: study.plot_memory(r, {(1, 2048): (1.0, 1.0, 8.4), (4, 1024): (1.0, 1.0, 1.0)}), 4 * 5 + 1),
    ],
)
def test_figures_draw_what_they_return(draw, rows, record, shown):
    assert len(draw(record)) == rows
    assert len(shown) == 1 and shown[0].stat().st_size < 150 * 1024


def test_what_ships_may_have_polynomials(card):
    record = card.record("prefill", some(card, ROW, {OURS: 1.2, PLAIN: 1.0}))
    (found,) = [f for f in findings([record]) if f["key"] == "prefill.polynomial_gain"]
    assert found["value"] == pytest.approx(1.2)


def test_without_variants_nothing_is_drawn(card, shown):
    assert study.plot_variants(card.record("prefill", some(card, ROW, {OURS: 1.0}))).empty and not shown


def test_errors_are_the_largest_by_head_dim(record):
    by = study.errors(record).set_index("d")
    assert by.loc["64", "PyTorch"] == 1.1e-3 and by.loc["192/128", "mla_prefill"] == 1e-3
    assert by.loc["192/128"].isna().sum() >= 2
