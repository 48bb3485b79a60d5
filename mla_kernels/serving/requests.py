"""Requests to a server, and traces of them: chats that share prefixes, and Poisson arrivals of given lengths.

What a prompt says is described, not stored: it is a tuple of segments, and a segment is a text known by its
id. Prompts that begin with equal segments begin with equal tokens, and no others do: ``token_ids`` labels
each token by its segment and its place there, so hashes of token blocks agree exactly where the texts do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .lengths import Lengths, LogNormal, generator, zipf_ranks

_PLACE_BITS = 32  # of a token id: its place in the segment; the segment's id is above
MAX_SEGMENT_TOKENS = 2**_PLACE_BITS - 1
MAX_SEGMENT_ID = 2 ** (63 - _PLACE_BITS) - 1


class Segment(NamedTuple):
    """A text of ``tokens`` tokens. Two segments of one id are the same text, so they have the same length."""

    id: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of ``context_tokens`` that arrives ``arrival_s`` seconds into its trace, and its answer.

    The answer has ``generated_tokens``. ``prompt`` and ``reply`` are the texts (empty and None: not known);
    ``conversation`` numbers the chat that this is the ``turn``-th request of, from 0 (None: no chat).
    ValueError where a number is negative or not finite, or a text has another length than the tokens stated.
    """

    arrival_s: float
    context_tokens: int
    generated_tokens: int
    prompt: tuple[Segment, ...] = ()
    reply: Segment | None = None
    conversation: int | None = None
    turn: int = 0

    def __post_init__(self):
        if not 0 <= self.arrival_s < math.inf:
            raise ValueError(f"arrival_s {self.arrival_s}: count seconds from the trace's start, at least 0")
        if self.context_tokens < 0 or self.generated_tokens < 0 or self.turn < 0:
            raise ValueError(
                f"context_tokens {self.context_tokens}, generated_tokens {self.generated_tokens}, "
                f"turn {self.turn}: choose numbers of at least 0"
            )
        if self.prompt:
            _check_text("prompt", self.prompt, self.context_tokens, "context_tokens")
        if self.reply is not None:
            _check_text("reply", (self.reply,), self.generated_tokens, "generated_tokens")


def _check_text(name: str, segments: tuple[Segment, ...], tokens: int, field: str) -> None:
    for segment in segments:
        if not (0 <= segment.id <= MAX_SEGMENT_ID and 0 <= segment.tokens <= MAX_SEGMENT_TOKENS):
            raise ValueError(
                f"{name} has {segment}: ids are 0 to {MAX_SEGMENT_ID}, tokens 0 to {MAX_SEGMENT_TOKENS}"
            )
    total = sum(segment.tokens for segment in segments)
    if total != tokens:
        raise ValueError(f"{name} has {total} tokens but {field} is {tokens}: make them equal")


def token_ids(text: Iterable[Segment]) -> np.ndarray:
    """The tokens of a prompt, or of ``(request.reply,)``: int64 of shape (tokens,).

    They are labels, not entries of a vocabulary: two are equal if and only if they are of one segment and
    stand at the same place in it. Made on demand, at the cost of writing them.
    """
    runs = [np.arange(tokens, dtype=np.int64) + (segment << _PLACE_BITS) for segment, tokens in text]
    return np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)


def independent(
    arrival_s: Sequence[float], context_tokens: Sequence[int], generated_tokens: Sequence[int]
) -> list[Request]:
    """Requests that share no text, in the order given. ValueError if the three sequences differ in length."""
    rows = zip(arrival_s, context_tokens, generated_tokens, strict=True)
    return [
        Request(arrival, context, generated, (Segment(2 * i, context),), Segment(2 * i + 1, generated))
        for i, (arrival, context, generated) in enumerate(rows)
    ]


def poisson(
    n: int, rate_per_s: float, context: Lengths, generated: Lengths, *, seed: int | np.random.Generator
) -> list[Request]:
    """``n`` requests of an open loop: they arrive at ``rate_per_s`` on average whatever the server does.

    Gaps are exponential and the first request arrives at 0 s. Prompts are of lengths ``context``, answers of
    ``generated``, and no two share text. ValueError for n under 1 or a rate not above 0.
    """
    rng = generator(seed)
    arrivals = _poisson_arrivals(n, rate_per_s, rng)
    return independent(arrivals.tolist(), context.draw(n, rng).tolist(), generated.draw(n, rng).tolist())


# Lengths of a chat's texts where the caller gives none: a choice of this study, not measured anywhere.
SYSTEM_TOKENS = LogNormal(mean=1024, sd=512, max_tokens=4096)
USER_TOKENS = LogNormal(mean=128, sd=256, max_tokens=4096)
REPLY_TOKENS = LogNormal(mean=256, sd=256, max_tokens=2048)


def chats(
    conversations: int,
    rate_per_s: float,
    *,
    seed: int | np.random.Generator,
    system_prompts: int = 16,
    popularity: float = 1.0,
    mean_turns: float = 4.0,
    think_s: float = 30.0,
    reply_s_per_token: float = 0.02,
    system: Lengths = SYSTEM_TOKENS,
    user: Lengths = USER_TOKENS,
    reply: Lengths = REPLY_TOKENS,
    max_tokens: int = 32768,
) -> list[Request]:
    """Conversations of several turns whose prompts grow and share prefixes; one request a turn, by arrival.

    The prompt of a turn is a system prompt, then all earlier questions and replies of the conversation, then
    a new question: a later turn's prompt begins with an earlier turn's ``(*prompt, reply)``. Each
    conversation has one of ``system_prompts`` system prompts, the k-th in proportion to k ** -popularity.

    Conversations start at ``rate_per_s`` (exponential gaps, the first at 0 s) and have 1, 2, ... turns,
    geometric of mean ``mean_turns``; one ends sooner where its next prompt and reply would exceed
    ``max_tokens``. The loop is open: a turn follows the one before by the time of that one's reply, taken as
    ``reply_s_per_token`` a token, and an exponential time to think of mean ``think_s`` seconds. ``system``,
    ``user``, ``reply``: lengths of the texts. ValueError for a parameter out of range, or where a first turn
    might exceed ``max_tokens``.
    """
    _check_chats(
        conversations, system_prompts, popularity, mean_turns, think_s, reply_s_per_token,
        system.max_tokens + user.max_tokens + reply.max_tokens, max_tokens,
    )  # fmt: skip
    rng = generator(seed)
    starts = _poisson_arrivals(conversations, rate_per_s, rng).tolist()
    systems = [Segment(i, tokens) for i, tokens in enumerate(system.draw(system_prompts, rng).tolist())]
    ranks = zipf_ranks(conversations, popularity, system_prompts, rng).tolist()
    turns = rng.geometric(1 / mean_turns, conversations).tolist()
    asked = user.draw(sum(turns), rng).tolist()
    answered = reply.draw(sum(turns), rng).tolist()
    thought_s = rng.exponential(think_s, sum(turns)).tolist()

    requests = []
    first = 0  # draw of the conversation's first turn
    for conversation, (arrival, rank, planned) in enumerate(zip(starts, ranks, turns, strict=True)):
        history = (systems[rank - 1],)
        for turn, draw in enumerate(range(first, first + planned)):
            question = Segment(system_prompts + 2 * draw, asked[draw])
            answer = Segment(system_prompts + 2 * draw + 1, answered[draw])
            prompt = (*history, question)
            context = sum(segment.tokens for segment in prompt)
            if context + answer.tokens > max_tokens:
                break
            requests.append(Request(arrival, context, answer.tokens, prompt, answer, conversation, turn))
            history = (*prompt, answer)
            arrival += answer.tokens * reply_s_per_token + thought_s[draw]
        first += planned
    return sorted(requests, key=lambda request: (request.arrival_s, request.conversation, request.turn))


def _check_chats(
    conversations, system_prompts, popularity, mean_turns, think_s, reply_s_per_token, first_turn, max_tokens
) -> None:
    for name, value, least in (
        ("conversations", conversations, 1),
        ("system_prompts", system_prompts, 1),
        ("popularity", popularity, 0),
        ("mean_turns", mean_turns, 1),
        ("think_s", think_s, 0),
        ("reply_s_per_token", reply_s_per_token, 0),
    ):
        if not least <= value < math.inf:
            raise ValueError(f"{name} {value}: choose a finite number of at least {least}")
    if first_turn > max_tokens:
        raise ValueError(
            f"a first turn may have {first_turn} tokens (system prompt, question and reply at their longest) "
            f"but max_tokens is {max_tokens}: raise it, or lower max_tokens of system, user or reply"
        )


def _poisson_arrivals(n: int, rate_per_s: float, rng: np.random.Generator) -> np.ndarray:
    if n < 1:
        raise ValueError(f"{n} arrivals: a trace has at least 1")
    if not 0 < rate_per_s < math.inf:
        raise ValueError(f"rate_per_s {rate_per_s}: choose a finite number above 0")
    gaps = rng.exponential(1 / rate_per_s, n)
    gaps[0] = 0.0
    return np.cumsum(gaps)


@dataclass(frozen=True)
class TokenSummary:
    """Tokens a request: their sum, mean, median, 99th percentile (linear between neighbours) and largest."""

    total: int
    mean: float
    median: float
    p99: float
    largest: int


@dataclass(frozen=True)
class TraceSummary:
    """What a trace holds. ``conversations`` counts the chats in it, 0 where its requests are of none.

    ``duration_s``: from the first arrival to the last. ``rate_per_s``: arrivals after the first, over that;
    inf where several arrive at once, nan for a single request.
    """

    requests: int
    conversations: int
    context: TokenSummary
    generated: TokenSummary
    duration_s: float
    rate_per_s: float


def describe(requests: Sequence[Request]) -> TraceSummary:
    """Counts, tokens, duration and rate of a trace in any order; ValueError if it is empty."""
    if not requests:
        raise ValueError("a trace without requests has no mean or rate: give at least one request")
    arrivals = [request.arrival_s for request in requests]
    duration_s, gaps = max(arrivals) - min(arrivals), len(requests) - 1
    at_once = math.inf if gaps else math.nan
    return TraceSummary(
        requests=len(requests),
        conversations=len({request.conversation for request in requests} - {None}),
        context=_summarize([request.context_tokens for request in requests]),
        generated=_summarize([request.generated_tokens for request in requests]),
        duration_s=duration_s,
        rate_per_s=gaps / duration_s if duration_s else at_once,
    )


def _summarize(tokens: list[int]) -> TokenSummary:
    median, p99 = np.percentile(tokens, [50, 99]).tolist()
    return TokenSummary(sum(tokens), sum(tokens) / len(tokens), median, p99, max(tokens))
