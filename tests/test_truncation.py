"""The constant that gives back what tensor cores truncate, from a model of how they add."""

import numpy as np
import torch

from mla_kernels.decode import _TRUNCATION

STEPS, STEPS_A_BOX = 36, 4  # 576 columns in steps of 16, boxes of 64


def truncate(x: np.ndarray) -> np.ndarray:
    """Toward zero, to one bit more than fp32's 24: what an H200 loses fits this, and not 24 or 26."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(mantissa * 2**25) / 2**25, exponent)


def relative_loss(steps_a_chain: int) -> float:
    """Mean relative error of the largest of 4096 scores: chains truncate at each step, fp32 adds them."""
    generator = np.random.default_rng(0)
    q, k = 10 * generator.standard_normal((1000, 576)), generator.standard_normal((4096, 576))
    q, k = q.astype(np.float16).astype(float), k.astype(np.float16).astype(float)
    products = q * k[(q @ k.T).argmax(1)]
    steps = products.reshape(-1, STEPS, 16).sum(2)
    total = np.zeros(len(q), np.float32)
    for first in range(0, STEPS, steps_a_chain):
        chain = np.zeros(len(q))
        for step in range(first, min(first + steps_a_chain, STEPS)):
            chain = truncate(chain + steps[:, step])
        total += chain.astype(np.float32)
    exact = products.sum(1)
    return float(((exact - total) / exact).mean())


def test_model_loses_what_an_h200_lost() -> None:
    measured = {1: 4.2e-8, 2: 8.5e-8, 3: 1.44e-7}  # boxes a chain: mean of LSE error / LSE, sd 10, bf16
    for boxes, loss in measured.items():
        assert abs(relative_loss(boxes * STEPS_A_BOX) / loss - 1) < 0.3, boxes


def test_constant_is_near_the_mean_loss() -> None:
    for dtype, boxes in ((torch.bfloat16, 2), (torch.float16, 1)):
        assert 1 < _TRUNCATION[dtype] / relative_loss(boxes * STEPS_A_BOX) < 1.6


def test_one_long_chain_loses_several_times_as_much() -> None:
    assert relative_loss(STEPS) > 3 * relative_loss(2 * STEPS_A_BOX)
