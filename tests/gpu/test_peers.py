"""Every peer that was fetched, checked against the oracle and timed once beside our kernel."""

import pytest
import torch

from mla_kernels.measure import points
from mla_kernels.measure.peers import PEERS
from mla_kernels.measure.workloads import lognormal, uniform

CASES = {
    "16 heads": uniform(4, 1000, h_q=16),
    "128 heads": uniform(4, 1000, h_q=128),
    "two tokens": uniform(4, 1000, h_q=16, s_q=2),
    "lengths that differ": lognormal(8, 1000, 500, seed=1, h_q=24, dtype="fp16"),
}


@pytest.mark.parametrize("workload", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", PEERS)
def test_peer_is_right_and_timed(name, workload):
    if reason := PEERS[name].available():
        pytest.skip(reason)
    poison = (name, workload.h_q) != ("fa3", 128)  # it gives NaN where NaN lies behind the last token
    step = points.Step(workload, ("mla_kernels", f"peer:{name}"), poison=poison)
    for point in points.measure(step, l2_bytes=torch.cuda.get_device_properties(0).L2_cache_size, seed=0):
        if point.status == "skipped":
            pytest.skip(point.reason)
        assert point.status == "ok", point.reason
        assert point.per_call_us > 0
