"""Drawn lengths: whole, in range, of the moments asked for, and the same for a seed everywhere."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_kernels.measure import workloads
from mla_kernels.serving import (
    CHAPTER_BATCHES,
    CHAPTER_LOGNORMAL,
    LogNormal,
    Normal,
    Uniform,
    Zipf,
)

MANY = 200_000
limits = st.integers(1, 40_000)
distributions = st.one_of(
    st.builds(LogNormal, st.floats(0.1, 1e5), st.floats(0, 1e5), limits),
    st.builds(Normal, st.floats(0.1, 1e5), st.floats(0, 1e5), limits),
    st.builds(Zipf, st.floats(0, 4), limits),
    st.tuples(limits, limits).map(lambda ends: Uniform(*sorted(ends))),
)


@given(lengths=distributions, n=st.integers(0, 300), seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_draws_are_whole_in_range_and_decided_by_the_seed(lengths, n, seed):
    drawn = lengths.draw(n, seed)
    assert drawn.shape == (n,) and drawn.dtype == np.int64
    assert ((drawn >= 1) & (drawn <= lengths.max_tokens)).all()
    assert np.array_equal(drawn, lengths.draw(n, seed))


@pytest.mark.parametrize("lengths", [CHAPTER_LOGNORMAL, Normal(4096, 2048), Uniform(1, 4096), Zipf(1.2)])
def test_another_seed_draws_other_lengths_and_a_generator_goes_on(lengths):
    assert not np.array_equal(lengths.draw(100, 1), lengths.draw(100, 2))
    rng = np.random.Generator(np.random.PCG64(1))
    first, second = lengths.draw(100, rng), lengths.draw(100, rng)
    assert np.array_equal(first, lengths.draw(100, 1)) and not np.array_equal(first, second)


# Written down from one machine: other platforms and releases of numpy must draw these.
@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        (CHAPTER_LOGNORMAL, [1944, 1721, 2479, 1925, 1422, 2173, 3392, 2865]),
        (Normal(4096, 2048), [4353, 3825, 5408, 4311, 2999, 4837, 6767, 6036]),
        (Uniform(1, 4096), [3485, 2609, 2094, 1106, 1261, 168, 309, 68]),
        (Zipf(1.2), [37, 2, 1, 1, 347, 2354, 27, 106]),
    ],
)
def test_the_lengths_of_seed_0_stay_what_they_are(lengths, expected):
    assert lengths.draw(8, 0).tolist() == expected


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_log_normal_lengths_have_the_chapters_mean_and_sd(seed):
    drawn = CHAPTER_LOGNORMAL.draw(MANY, seed)
    assert drawn.mean() == pytest.approx(2048, rel=0.02) and drawn.std() == pytest.approx(1024, rel=0.02)
    assert np.median(drawn) == pytest.approx(2048 / 1.25**0.5, rel=0.02)  # below the mean: a log-normal's


def test_normal_and_uniform_lengths_have_their_moments():
    drawn = Normal(4096, 512).draw(MANY, 0)
    assert drawn.mean() == pytest.approx(4096, rel=0.01) and drawn.std() == pytest.approx(512, rel=0.02)
    assert np.mean(np.abs(drawn - 4096) < 512) == pytest.approx(0.6827, abs=0.01)
    drawn = Uniform(5, 8).draw(MANY, 0)
    assert np.bincount(drawn)[5:] / MANY == pytest.approx([0.25] * 4, rel=0.03)
    assert Uniform(1024, 1024).draw(3, 0).tolist() == [1024] * 3


def test_what_falls_outside_is_set_to_the_limit():
    drawn = Normal(50, 100, max_tokens=60).draw(MANY, 0)
    assert np.mean(drawn == 1) == pytest.approx(0.314, abs=0.01)  # P(x < 1.5)
    assert np.mean(drawn == 60) == pytest.approx(0.462, abs=0.01)  # P(x > 59.5)


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.2, 2.0])
def test_zipf_lengths_are_ordered_and_truncated(exponent):
    counts = np.bincount(Zipf(exponent, max_tokens=64).draw(MANY, 3), minlength=65)[1:]
    weights = np.arange(1, 65.0) ** -exponent
    # Within 5 standard deviations of k ** -exponent over its sum, the last length included.
    expected = MANY * weights / weights.sum()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()
    if exponent:
        assert counts[0] > counts[1] > counts[3] > counts[7] > counts[15]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(0, 1), r"mean length 0 .*above 0"),
        (lambda: LogNormal(float("nan"), 1), r"mean length nan .*above 0"),
        (lambda: LogNormal(2048, -1), r"standard deviation -1 .*at least 0"),
        (lambda: Normal(float("inf"), 1), r"mean length inf .*finite"),
        (lambda: Normal(1, 1, max_tokens=0), r"max_tokens 0: .*1 or more"),
        (lambda: Uniform(0, 5), r"from 0 to 5 tokens: choose 1 <= low"),
        (lambda: Uniform(6, 5), r"from 6 to 5 tokens: choose 1 <= low"),
        (lambda: Zipf(-0.5), r"exponent -0.5: choose"),
        (lambda: Zipf(1.0, max_tokens=0), r"max_tokens 0: .*1 or more"),
    ],
)
def test_a_distribution_that_cannot_be_is_refused_with_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_chapters_batches_are_its_own():
    quoted = {
        "uniform_1k": (4, [1024, 1024, 1024, 1024]),
        "variable_medium": (4, [512, 1024, 2048, 4096]),
        "variable_wide": (8, [256, 512, 1024, 2048, 4096, 8192, 16384, 32768]),
    }
    assert {name: (len(batch), list(batch)) for name, batch in CHAPTER_BATCHES.items()} == quoted
    assert (CHAPTER_LOGNORMAL.mean, CHAPTER_LOGNORMAL.sd) == (2048, 1024)


def test_lengths_make_workloads():
    for batch in CHAPTER_BATCHES.values():
        assert workloads.explicit(batch, h_q=16).lengths == batch
    drawn = CHAPTER_LOGNORMAL.draw(16, 0)
    assert workloads.explicit(drawn, h_q=16).lengths == tuple(drawn.tolist())
