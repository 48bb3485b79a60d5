"""The constant that gives back what tensor cores truncate, from a model of how they add."""

import numpy as np

from mla_kernels.decode import _TRUNCATION

STEPS, STEPS_A_CHAIN = 36, 4  # 576 columns in steps of 16; a chain ends with its box of 64


def truncate(x: np.ndarray) -> np.ndarray:
    """Toward zero, to fp32's 24 bits."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.trunc(mantissa * 2**24) / 2**24, exponent)


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
        for step in range(first, first + steps_a_chain):
            chain = truncate(chain + steps[:, step])
        total += chain.astype(np.float32)
    exact = products.sum(1)
    return float(((exact - total) / exact).mean())


def test_constant_is_the_mean_loss_of_nine_chains():
    assert abs(relative_loss(STEPS_A_CHAIN) - _TRUNCATION) < 0.2 * _TRUNCATION


def test_one_long_chain_loses_several_times_as_much():
    assert relative_loss(STEPS) > 5 * relative_loss(STEPS_A_CHAIN)
