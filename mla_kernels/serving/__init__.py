"""Deployment studies: the lengths and requests that a server meets."""

from .azure import TraceError, read_azure
from .lengths import (
    CHAPTER_BATCH_SIZES,
    CHAPTER_BATCHES,
    CHAPTER_LOGNORMAL,
    UNIFORM_1K,
    VARIABLE_MEDIUM,
    VARIABLE_WIDE,
    Lengths,
    LogNormal,
    Normal,
    Uniform,
    Zipf,
)
from .requests import (
    Request,
    Segment,
    TokenSummary,
    TraceSummary,
    chats,
    describe,
    independent,
    poisson,
    token_ids,
)

__all__ = [
    "CHAPTER_BATCHES",
    "CHAPTER_BATCH_SIZES",
    "CHAPTER_LOGNORMAL",
    "UNIFORM_1K",
    "VARIABLE_MEDIUM",
    "VARIABLE_WIDE",
    "Lengths",
    "LogNormal",
    "Normal",
    "Request",
    "Segment",
    "TokenSummary",
    "TraceError",
    "TraceSummary",
    "Uniform",
    "Zipf",
    "chats",
    "describe",
    "independent",
    "poisson",
    "read_azure",
    "token_ids",
]
