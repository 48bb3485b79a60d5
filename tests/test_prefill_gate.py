"""What every instance of the prefill kernel became, proved without a GPU."""

import pytest

from mla_kernels import compiler
from mla_kernels.prefill_tuning import shipped_prefill_configs


@pytest.mark.parametrize("config", shipped_prefill_configs(), ids=lambda config: config.name)
def test_prefill_kernel(config):
    kernel = compiler.compile_kernel(config)
    report = compiler.resource_report(kernel)
    assert report.stack_bytes == 0, "a register array with a run-time index, or spills"
    assert (report.local_loads, report.local_stores) == (0, 0)
    assert report.hgmma > 0, "no tensor-core instruction"
    boxes = {name: value // 64 for name, value in config.defines if name.startswith("MLA_HEAD_DIM")}
    # the query's boxes; those of K and of V, before the loop over tiles and in it
    assert report.utmaldg == 3 * boxes["MLA_HEAD_DIM"] + 2 * boxes["MLA_HEAD_DIM_V"]
    assert report.registers <= 65536 // config.threads // 8 * 8, "what the threads can have at launch"
    assert report.shared_bytes <= 227 * 1024
    assert "C75" not in kernel.log, f"ptxas serialized WGMMA or ignored setmaxnreg: {kernel.log}"


def test_names_are_of_one_configuration_each():
    configs = shipped_prefill_configs()
    assert len({config.name for config in configs}) == len(configs)
