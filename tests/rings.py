"""The simulator of a CTA's warps (on_host/rings.cpp), by the layouts that ship."""

from pathlib import Path

from mla_kernels.choice import active_table
from mla_kernels.compiler import CUDA_DIR
from tests import simulators
from tests.simulators import HOST

# Pairs of CTAs have a ring of their own: test_pair.py.
ALONE = [tuning for tuning in active_table().variants if tuning.cluster_ctas == 1]
# By query rows a CTA.
LAYOUTS = {tuning.rows: dict(tuning.kernel_config("bf16").defines) for tuning in ALONE}
IN_PIECES = {  # the same for pages that are no tiles
    tuning.rows: dict(tuning.kernel_config("bf16", pages="pieces").defines) for tuning in ALONE
}
SHORTEST = {"MLA_GROUP_SLOTS": 3, "MLA_ROTARY_SLOTS": 2}


def build(folder: Path, rows: int, sources: Path = HOST, headers: Path = CUDA_DIR, **changed: int) -> Path:
    """The simulator with the layout of ``rows``, some of its macros ``changed``."""
    return simulators.build("rings", folder, (LAYOUTS[rows] | changed).items(), sources, headers)
