"""The constant that gives back what tensor cores truncate, from a model of how they add."""

import numpy as np
import torch

from mla_kernels.plan import _TRUNCATION

STEPS, STEPS_A_BOX = 36, 4  # 576 columns in steps of 16, boxes of 64


def truncate(x: np.ndarray) -> np.ndarray:
    """Toward zero, to one bit more than fp32's 24: what an H200 loses fits this, and not 24 or 26."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(mantissa * 2**25) / 2**25, exponent)


def relative_loss(chains: list[range]) -> float:
    """Mean relative error of the largest of 4096 scores: chains truncate at each step, fp32 adds them."""
    generator = np.random.default_rng(0)
    q, k = 10 * generator.standard_normal((1000, 576)), generator.standard_normal((4096, 576))
    q, k = q.astype(np.float16).astype(float), k.astype(np.float16).astype(float)
    products = q * k[(q @ k.T).argmax(1)]
    steps = products.reshape(-1, STEPS, 16).sum(2)
    total = np.zeros(len(q), np.float32)
    for steps_of_chain in chains:
        chain = np.zeros(len(q))
        for step in steps_of_chain:
            chain = truncate(chain + steps[:, step])
        total += chain.astype(np.float32)
    exact = products.sum(1)
    return float(((exact - total) / exact).mean())


def in_a_row(steps_a_chain: int) -> list[range]:
    """Chains one after the other, as decode_rows.cu sums large scores."""
    return [range(first, min(first + steps_a_chain, STEPS)) for first in range(0, STEPS, steps_a_chain)]


def side_by_side(boxes_a_set: int) -> list[range]:
    """Step k of every box of a set to chain k of it, as decode_swapped.cu does."""
    size = boxes_a_set * STEPS_A_BOX
    sets = [range(first, min(first + size, STEPS)) for first in range(0, STEPS, size)]
    return [steps[k::STEPS_A_BOX] for steps in sets for k in range(STEPS_A_BOX)]


CHAINS = {  # what the kernels do, by dtype
    torch.bfloat16: (in_a_row(2 * STEPS_A_BOX), side_by_side(9)),
    torch.float16: (in_a_row(STEPS_A_BOX), side_by_side(5)),
}


def test_model_loses_what_an_h200_lost() -> None:
    measured = {1: 4.2e-8, 2: 8.5e-8, 3: 1.44e-7}  # boxes a chain: mean of LSE error / LSE, sd 10, bf16
    for boxes, loss in measured.items():
        assert abs(relative_loss(in_a_row(boxes * STEPS_A_BOX)) / loss - 1) < 0.3, boxes


def test_every_step_is_in_one_chain() -> None:
    for schemes in CHAINS.values():
        for chains in schemes:
            assert sorted(step for chain in chains for step in chain) == list(range(STEPS))


def test_constant_is_near_the_mean_loss() -> None:
    for dtype, schemes in CHAINS.items():
        for chains in schemes:
            assert 1 < _TRUNCATION[dtype] / relative_loss(chains) < 1.6


def test_long_chains_lose_several_times_as_much() -> None:
    short = relative_loss(in_a_row(2 * STEPS_A_BOX))
    assert relative_loss([range(STEPS)]) > 3 * short
    assert relative_loss(in_a_row(20)) > 2 * short  # so they serve small scores alone
