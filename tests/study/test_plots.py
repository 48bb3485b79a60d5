"""Figures draw what the record holds, return it, and stay small; tables of the notebooks."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from mla_kernels.measure.energy import fit_energy_roof
from mla_kernels.study import bandwidth as bandwidth_plots
from mla_kernels.study import fits, style, tables
from mla_kernels.study import roofline as roofline_plots

LIMIT_BYTES = 150 * 1024


@pytest.mark.parametrize("name", ["plot_rows", "plot_roofline", "plot_sustained"])
def test_roofline_figures(name, roofline, shown):
    data = getattr(roofline_plots, name)(roofline)
    assert len(data) and data.us.notna().all()
    assert len(shown) == 1 and shown[0].stat().st_size < LIMIT_BYTES
    assert plt.get_fignums() == []


@pytest.mark.parametrize("name", ["plot_power", "plot_energy", "plot_three_roofs"])
def test_power_figures(name, roofline, shown):
    roof = fit_energy_roof(roofline)
    arguments = (roofline, roof, 700.0) if name == "plot_three_roofs" else (roofline, roof)
    assert len(getattr(roofline_plots, name)(*arguments))
    assert len(shown) == 1 and shown[0].stat().st_size < LIMIT_BYTES


@pytest.mark.parametrize("name", ["fixed_cost", "batch", "length", "heads", "l2"])
def test_bandwidth_figures(name, bandwidth, shown):
    assert len(getattr(bandwidth_plots, f"plot_{name}")(bandwidth))
    assert len(shown) == 1 and shown[0].stat().st_size < LIMIT_BYTES


def test_caption_has_device_and_date(roofline):
    assert "NVIDIA H200" in style.caption(roofline) and "2026-01-01" in style.caption(roofline)


def test_floor_is_below_every_point(card, roofline, shown):
    data = roofline_plots.plot_rows(roofline)
    assert (data.over_floor > 1 / card.read_share).all()
    flat = data[(data.rows <= 16) & (data.kv == 16384)].over_floor
    assert flat.max() < 1.1 * flat.min()


def test_energy_parts_add_up_to_what_was_measured(card, roofline):
    data = roofline_plots.energy_parts(roofline, fit_energy_roof(roofline))
    held = [p for p in roofline.points if p.mode == "sustained" and p.is_attention]
    assert len(data) == len(held) >= 3
    total = data[list(roofline_plots.PARTS)].sum(axis=1)
    assert total.to_numpy() == pytest.approx(data.mj_per_token.to_numpy(), rel=1e-6)


def test_power_table_knows_what_the_fit_saw(roofline):
    table = roofline_plots.power_table(roofline, fit_energy_roof(roofline))
    assert table.residual.abs().max() < 1e-6
    assert not table[table.implementation == "mla_kernels"].fitted.any()
    assert table[table.implementation == "block:mma"].fitted.all()


def test_prediction_of_a_sweep_is_the_fit(card, bandwidth):
    data = bandwidth_plots.sweep(bandwidth, "b", kv=4096, h_q=16)
    ours = data[data.implementation == "mla_kernels"]
    assert ours.b.is_monotonic_increasing and len(ours) >= 5
    assert ours.tb_s.to_numpy() == pytest.approx(ours.predicted.to_numpy(), rel=1e-6)


def test_l2_effect_pairs_the_same_shape(card, bandwidth):
    data = bandwidth_plots.l2_effect(bandwidth)
    in_l2 = data.kv_mb * 1e6 < card.l2_bytes
    assert (data.speedup[in_l2] > 1.02).all()
    assert data.speedup[~in_l2].to_numpy() == pytest.approx(1)


def test_uneven_lengths_against_the_same_tokens(card, bandwidth):
    data = bandwidth_plots.uneven(bandwidth)
    assert sorted(zip(data.lengths, data.h_q, strict=True)) == [
        ("lognormal", 16),
        ("lognormal", 128),
        ("normal", 16),
        ("normal", 128),
    ]
    assert data.penalty.between(0.03, card.uneven - 1).all()


def test_counters_are_shown_or_their_absence_explained(card, bandwidth):
    assert bandwidth_plots.counters(bandwidth).empty
    point = bandwidth.points[0]
    counted = point.model_copy(update={"counters": {"dram_read_bytes": 2.0e6, "l2_to_sm_bytes": 3.0e6}})
    refused = point.model_copy(update={"counters_reason": "ncu (Nsight Compute) is not on PATH"})
    record = bandwidth.model_copy(update={"points": [counted, refused, refused]})
    assert len(bandwidth_plots.counters(record)) == 1
    assert bandwidth_plots.counters_missing(record) == ["ncu (Nsight Compute) is not on PATH"]


def test_missing_points_keep_their_reason(card, roofline):
    failed = roofline.points[0].model_copy(update={"status": "failed", "reason": "out of memory"})
    record = roofline.model_copy(update={"points": [failed, *roofline.points[1:]]})
    assert tables.missing(record).reason.tolist() == ["out of memory"]
    assert len(tables.frame(record)) == len(roofline.points) - 1


def test_rows_and_intensity_are_inverse():
    for kv in (1024, 65536):
        assert fits.intensity_of(fits.rows_of(150.0, kv), kv) == pytest.approx(150.0)


def test_fits_refuse_too_few_points(card, roofline):
    with pytest.raises(LookupError, match="sweep of query rows"):
        fits.fit_knee(card.record("roofline", []))
    with pytest.raises(LookupError, match="lengths to fit"):
        fits.fit_fixed_cost(card.record("bandwidth", []))


@pytest.mark.parametrize(
    "value, text",
    [(0.8437, "0.844"), (4.669, "4.67"), (151.3, "151"), (1243.6, "1,244"), (1.5e-6, "1.5e-06"), (0.0, "0")],
)
def test_numbers_have_three_digits(value, text):
    assert tables.significant(value) == text


def test_markdown_table():
    table = pd.DataFrame({"name": ["a|b"], "value": [1.0]})
    assert tables.to_markdown(table).splitlines() == [
        "| name | value |",
        "| --- | ---: |",
        "| a\\|b | 1.00 |",
    ]
