"""The energy roof: coefficients that went in come out."""

import pytest

from mla_kernels.measure.energy import fit_energy_roof
from mla_kernels.measure.figures import point_bytes, point_flop

STATIC, PER_TB, PER_TFLOP = 150.0, 90.0, 0.55


@pytest.fixture
def block(make_point):
    """A sustained block whose power lies on the plane, but for ``extra_w``."""

    def make(kind, h_q, us, extra_w=0.0):
        silent = make_point(f"block:{kind}", us=us, h_q=h_q)
        power = STATIC + PER_TB * point_bytes(silent) / us / 1e6 + PER_TFLOP * point_flop(silent) / us / 1e6
        return make_point(f"block:{kind}", us=us, h_q=h_q, power_w=power + extra_w)

    return make


def test_recovers_the_coefficients(make_record, block, make_point):
    points = [
        block("stream", 16, 3.0),
        block("stream", 64, 2.5),
        block("mma", 64, 2.0),
        block("mma", 128, 3.0),
        block("skeleton", 64, 3.0),
        block("skeleton", 128, 4.0),
        # none of these may count: padded rows, attention, a burst, a failure
        block("mma", 16, 9.0, extra_w=300.0),
        block("skeleton", 16, 9.0, extra_w=300.0),
        make_point(us=2.0, power_w=999.0),
        make_point("block:mma", h_q=64),
        make_point("block:mma", h_q=64, status="failed", reason="x", samples_us=[]),
    ]
    roof = fit_energy_roof(make_record(points=points))
    assert (roof.static_w, roof.w_per_tb_s, roof.w_per_tflops) == pytest.approx((STATIC, PER_TB, PER_TFLOP))
    assert [point for point, _ in roof.residuals_w] == points[:6]
    assert all(abs(residual) < 1e-6 for _, residual in roof.residuals_w)
    speed = roof.tflops_at(flop_per_byte=240.0, cap_w=690.0)
    assert roof.power_w(speed / 240.0, speed) == pytest.approx(690.0)


def test_residuals_show_a_block_off_the_plane(make_record, block):
    points = [
        block("stream", 64, 2.5),
        block("mma", 64, 2.0),
        block("skeleton", 64, 3.0),
        block("mma", 128, 3.0),
    ]
    points.append(block("skeleton", 128, 4.0, extra_w=40.0))
    residuals = [residual for _, residual in fit_energy_roof(make_record(points=points)).residuals_w]
    assert max(residuals, key=abs) > 5 and sum(residuals) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kinds", [[], [("stream", 64)], [("stream", 64), ("stream", 128), ("stream", 16)]])
def test_too_few_blocks(make_record, block, kinds):
    points = [block(kind, h_q, 3.0) for kind, h_q in kinds]
    with pytest.raises(LookupError, match=r"cannot fit.*block:stream at 64 rows" if kinds else "none"):
        fit_energy_roof(make_record(points=points))
