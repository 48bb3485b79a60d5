"""The energy roof: board power as a line in memory traffic and arithmetic, P = P0 + a · TB/s + b · TFLOP/s.

Fitted to the building blocks under sustained load, which move bytes and do FLOP in known and different
proportions. Once the card is at its power cap, this line can bound the speed more tightly than either roof.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .figures import query_rows, tb_s, tflops
from .records import Point, Record

# Fitted are whole tiles of 64 query rows: other counts compute padding, and few rows run in another layout,
# whose FLOP cost other energy.
ROW_TILE = 64


@dataclass(frozen=True)
class EnergyRoof:
    """P = ``static_w`` + ``w_per_tb_s`` · (TB/s) + ``w_per_tflops`` · (TFLOP/s); W per TB/s are pJ/B.

    ``residuals_w``: (point, measured − fitted power) of every block fitted.
    """

    static_w: float
    w_per_tb_s: float
    w_per_tflops: float
    residuals_w: tuple[tuple[Point, float], ...]

    def power_w(self, tb_per_s: float, tflop_per_s: float) -> float:
        return self.static_w + self.w_per_tb_s * tb_per_s + self.w_per_tflops * tflop_per_s

    def tflops_at(self, flop_per_byte: float, cap_w: float) -> float:
        """TFLOP/s at which the power cap is met by work of this intensity."""
        return (cap_w - self.static_w) / (self.w_per_tb_s / flop_per_byte + self.w_per_tflops)


def fit_energy_roof(record: Record) -> EnergyRoof:
    """Least squares over the sustained blocks of a record whose query rows fill whole tiles of 64.

    Raises LookupError, naming the blocks found, where they do not determine three coefficients.
    """
    blocks = [point for point in record.points if _is_fitted(point)]
    terms = np.array([(1.0, tb_s(point), tflops(point)) for point in blocks]).reshape(-1, 3)
    if np.linalg.matrix_rank(terms, tol=1e-3) < 3:
        found = ", ".join(f"{p.implementation} at {query_rows(p.workload)} rows" for p in blocks) or "none"
        raise LookupError(
            f"record {record.experiment!r} cannot fit P0, a and b: its sustained blocks are {found}; "
            "measure block:stream, block:mma and block:skeleton at two row counts or more"
        )
    power = np.array([point.sustained.mean_power_w for point in blocks])
    coefficients, *_ = np.linalg.lstsq(terms, power, rcond=None)
    residuals = power - terms @ coefficients
    return EnergyRoof(*coefficients.tolist(), tuple(zip(blocks, residuals.tolist(), strict=True)))


def _is_fitted(point: Point) -> bool:
    if point.is_attention or point.status != "ok" or point.sustained is None:
        return False
    whole_tiles = point.implementation == "block:stream" or query_rows(point.workload) % ROW_TILE == 0
    return whole_tiles and point.sustained.mean_power_w is not None
