"""Lengths of sequences: the batches that the chapter lists, and distributions to draw others from.

A distribution has ``draw(n, seed)``, which gives ``n`` whole numbers of tokens, int64 of shape (n,). Draws
of LogNormal and Normal are rounded to the nearest token and *clipped* to [1, max_tokens]: what falls outside
is set to the limit, so a tail that is cut moves the mean. The parameters describe the distribution before
that. A seed gives the same lengths on every platform: PCG64's stream is fixed, and rounding hides the C
library's last bit.

"The chapter" is the published analysis of FlashMLA that the study audits; lines are those of its text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# Chapter, performance tests, section 3 (变长序列性能测试): the `configs` of 'uniform_distribution', in order,
# under the keys of its `performance_metrics`. Only the first is uniform: in the others each length doubles.
UNIFORM_1K = (1024, 1024, 1024, 1024)  # line 196, metrics line 201
VARIABLE_MEDIUM = (512, 1024, 2048, 4096)  # line 197, metrics line 207
VARIABLE_WIDE = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # line 198, metrics line 213
CHAPTER_BATCHES = {
    "uniform_1k": UNIFORM_1K,
    "variable_medium": VARIABLE_MEDIUM,
    "variable_wide": VARIABLE_WIDE,
}

CHAPTER_BATCH_SIZES = (4, 8, 16)  # of its log-normal lengths, line 226
MAX_TOKENS = 32768  # the longest sequence that the chapter lists, line 198


def generator(seed: int | np.random.Generator) -> np.random.Generator:
    """numpy's generator over PCG64 of this seed; a generator passes through and goes on where it stands."""
    return seed if isinstance(seed, np.random.Generator) else np.random.Generator(np.random.PCG64(seed))


class Lengths(Protocol):
    """A distribution of lengths in tokens, none above ``max_tokens``."""

    @property
    def max_tokens(self) -> int: ...

    def draw(self, n: int, seed: int | np.random.Generator) -> np.ndarray:
        """``n`` lengths, int64 of shape (n,), each in [1, max_tokens]."""
        ...


@dataclass(frozen=True)
class _AroundMean:
    mean: float
    sd: float
    max_tokens: int = MAX_TOKENS

    def __post_init__(self):
        _check(self.mean, self.sd, self.max_tokens)


@dataclass(frozen=True)
class LogNormal(_AroundMean):
    """Log-normal lengths. ``mean`` and ``sd`` are those of the lengths in tokens, not of their logarithm.

    Raises ValueError for a mean not above 0, a negative sd or max_tokens under 1.
    """

    def draw(self, n: int, seed: int | np.random.Generator) -> np.ndarray:
        variance = math.log1p((self.sd / self.mean) ** 2)  # of the logarithm
        location = math.log(self.mean) - variance / 2
        return _whole(generator(seed).lognormal(location, math.sqrt(variance), n), self.max_tokens)


@dataclass(frozen=True)
class Normal(_AroundMean):
    """Normal lengths of this mean and standard deviation, in tokens.

    The clip at 1 is felt: of N(4096, 2048) 2.3 % are set to 1 token. Raises ValueError as LogNormal does.
    """

    def draw(self, n: int, seed: int | np.random.Generator) -> np.ndarray:
        return _whole(generator(seed).normal(self.mean, self.sd, n), self.max_tokens)


@dataclass(frozen=True)
class Uniform:
    """Every length from ``low`` to ``high`` tokens, both included, is as likely; equal ones give one length.

    Nothing is clipped: ValueError unless 1 <= low <= high.
    """

    low: int
    high: int

    def __post_init__(self):
        if not 1 <= self.low <= self.high:
            raise ValueError(f"lengths from {self.low} to {self.high} tokens: choose 1 <= low <= high")

    @property
    def max_tokens(self) -> int:
        return self.high

    def draw(self, n: int, seed: int | np.random.Generator) -> np.ndarray:
        return generator(seed).integers(self.low, self.high, n, dtype=np.int64, endpoint=True)


@dataclass(frozen=True)
class Zipf:
    """Length k with probability in proportion to k ** -exponent, k = 1 ... max_tokens.

    The law is truncated, not clipped: no weight gathers at max_tokens, and exponents down to 0 (uniform) are
    allowed. ValueError for a negative exponent or max_tokens under 1.
    """

    exponent: float
    max_tokens: int = MAX_TOKENS

    def __post_init__(self):
        _check(1.0, 0.0, self.max_tokens)
        if not 0 <= self.exponent < math.inf:
            raise ValueError(f"Zipf exponent {self.exponent}: choose a number of at least 0, usually 1 to 2")

    def draw(self, n: int, seed: int | np.random.Generator) -> np.ndarray:
        return zipf_ranks(n, self.exponent, self.max_tokens, seed)


def zipf_ranks(n: int, exponent: float, count: int, seed: int | np.random.Generator) -> np.ndarray:
    """``n`` ranks, int64 in [1, count]; rank k has probability in proportion to k ** -exponent."""
    reached = np.cumsum(np.arange(1, count + 1, dtype=np.float64) ** -exponent)
    drawn = np.searchsorted(reached, generator(seed).random(n) * reached[-1], side="right") + 1
    return np.minimum(drawn, count).astype(np.int64)  # a product may round up to the last sum


def _check(mean: float, sd: float, max_tokens: int) -> None:
    if not 0 < mean < math.inf:
        raise ValueError(f"mean length {mean} tokens: choose a finite number above 0")
    if not 0 <= sd < math.inf:
        raise ValueError(f"standard deviation {sd} tokens: choose a finite number of at least 0")
    if max_tokens < 1:
        raise ValueError(f"max_tokens {max_tokens}: a sequence has at least 1 token, so choose 1 or more")


def _whole(drawn: np.ndarray, max_tokens: int) -> np.ndarray:
    return np.clip(np.rint(drawn), 1, max_tokens).astype(np.int64)


# Chapter, same section, 'real_world_distribution': log_normal, mean 2048, standard deviation 1024 (lines
# 221-225). It gives no largest length; at 32768 the clip meets less than one draw in 10^9.
CHAPTER_LOGNORMAL = LogNormal(mean=2048, sd=1024)
