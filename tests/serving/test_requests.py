"""Traces: sorted, decided by the seed, and of chats whose earlier turns are exact prefixes of later ones."""

import dataclasses
import math
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_kernels.serving import (
    CHAPTER_LOGNORMAL,
    Request,
    Segment,
    Uniform,
    chats,
    describe,
    independent,
    poisson,
    token_ids,
)

chat_traces = st.builds(
    chats,
    conversations=st.integers(1, 40),
    rate_per_s=st.floats(0.01, 100),
    seed=st.integers(0, 2**32),
    system_prompts=st.integers(1, 5),
    popularity=st.floats(0, 3),
    mean_turns=st.floats(1, 6),
    think_s=st.floats(0, 60),
    reply_s_per_token=st.floats(0, 0.1),
    system=st.builds(Uniform, st.just(1), st.integers(1, 50)),
    user=st.builds(Uniform, st.just(1), st.integers(1, 50)),
    reply=st.builds(Uniform, st.just(1), st.integers(1, 50)),
    max_tokens=st.integers(150, 1000),
)


def by_conversation(requests):
    turns = defaultdict(list)
    for request in requests:
        turns[request.conversation].append(request)
    return turns


@given(chat_traces)
@settings(max_examples=60, deadline=None)
def test_earlier_turns_are_exact_prefixes_of_later_ones(requests):
    arrivals = [request.arrival_s for request in requests]
    assert arrivals == sorted(arrivals) and arrivals[0] == 0
    for turns in by_conversation(requests).values():
        assert [request.turn for request in turns] == list(range(len(turns)))
        assert len(turns[0].prompt) == 2  # system prompt and first question
        for earlier, later in pairwise(turns):
            history = (*earlier.prompt, earlier.reply)
            assert later.prompt[:-1] == history
            known = token_ids(history)
            assert np.array_equal(token_ids(later.prompt)[: len(known)], known)
            assert later.context_tokens > len(known) == earlier.context_tokens + earlier.generated_tokens


@given(chat_traces)
@settings(max_examples=60, deadline=None)
def test_tokens_add_up_and_no_text_is_used_twice(requests):
    lengths, used = {}, Counter()
    for request in requests:
        assert len(token_ids(request.prompt)) == request.context_tokens
        assert len(token_ids((request.reply,))) == request.generated_tokens
        for segment in (*request.prompt, request.reply):
            assert lengths.setdefault(segment.id, segment.tokens) == segment.tokens
        used.update(segment.id for segment in (request.prompt[-1], request.reply))
    assert set(used.values()) == {1}  # each question and reply is of one turn
    assert not used.keys() & {request.prompt[0].id for request in requests}  # and none is a system prompt


@given(
    conversations=st.integers(1, 30),
    seed=st.integers(0, 2**32),
    max_tokens=st.integers(60, 300),
)
@settings(max_examples=40, deadline=None)
def test_the_seed_decides_and_the_limit_only_ends_conversations(conversations, seed, max_tokens):
    options = {"system": Uniform(5, 20), "user": Uniform(1, 20), "reply": Uniform(1, 20)}
    limited = chats(conversations, 1.0, seed=seed, max_tokens=max_tokens, **options)
    assert limited == chats(conversations, 1.0, seed=seed, max_tokens=max_tokens, **options)
    free = {(r.conversation, r.turn): r for r in chats(conversations, 1.0, seed=seed, **options)}
    assert all(request == free[request.conversation, request.turn] for request in limited)
    kept = {(r.conversation, r.turn) for r in limited}
    for place, request in free.items():
        fits = request.context_tokens + request.generated_tokens <= max_tokens
        assert (place in kept) == fits
    assert {request.conversation for request in limited} == set(range(conversations))


def test_another_seed_gives_another_trace():
    assert chats(20, 1.0, seed=1) != chats(20, 1.0, seed=2)
    lengths = CHAPTER_LOGNORMAL
    assert poisson(20, 1.0, lengths, lengths, seed=1) == poisson(20, 1.0, lengths, lengths, seed=1)
    assert poisson(20, 1.0, lengths, lengths, seed=1) != poisson(20, 1.0, lengths, lengths, seed=2)


def test_chats_have_the_popularity_turns_and_pauses_asked_for():
    requests = chats(
        20_000, 5.0, seed=4, system_prompts=4, popularity=1.0, mean_turns=3.0, think_s=20.0,
        reply_s_per_token=0.5, reply=Uniform(10, 10), max_tokens=10**6,
    )  # fmt: skip
    conversations = by_conversation(requests)
    popular = Counter(turns[0].prompt[0].id for turns in conversations.values())
    expected = np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)
    assert [popular[i] / 20_000 for i in range(4)] == pytest.approx(expected, rel=0.05)
    turns = np.array([len(turns) for turns in conversations.values()])
    assert turns.mean() == pytest.approx(3.0, rel=0.03)
    assert np.mean(turns == 1) == pytest.approx(1 / 3, rel=0.05)  # geometric
    pauses = np.concatenate([np.diff([r.arrival_s for r in turns]) for turns in conversations.values()]) - 5.0
    assert pauses.min() > -1e-6  # no turn before the reply to the one before it
    assert pauses.mean() == pytest.approx(20.0, rel=0.03) and pauses.std() == pytest.approx(20.0, rel=0.03)
    starts = np.diff([turns[0].arrival_s for turns in conversations.values()])
    assert starts.mean() == pytest.approx(0.2, rel=0.03) and starts.std() == pytest.approx(0.2, rel=0.03)


def test_poisson_arrivals_have_their_rate_and_lengths():
    requests = poisson(20_000, 8.0, CHAPTER_LOGNORMAL, Uniform(1, 500), seed=0)
    arrivals = [request.arrival_s for request in requests]
    assert arrivals[0] == 0 and arrivals == sorted(arrivals)
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03) and gaps.std() == pytest.approx(1 / 8, rel=0.03)
    summary = describe(requests)
    assert summary.rate_per_s == pytest.approx(8.0, rel=0.03)
    assert summary.context.mean == pytest.approx(2048, rel=0.02)
    assert summary.generated.mean == pytest.approx(250.5, rel=0.02)
    ids = [segment.id for request in requests for segment in (*request.prompt, request.reply)]
    assert len(set(ids)) == len(ids) == 40_000  # no two share text


@given(st.dictionaries(st.integers(0, 2**31 - 1), st.integers(0, 40), max_size=6))
def test_a_token_is_its_segment_and_its_place(text):
    ids = token_ids(Segment(*segment) for segment in text.items())
    assert ids.dtype == np.int64 and (ids >= 0).all()
    assert ids.tolist() == [segment * 2**32 + place for segment in text for place in range(text[segment])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Request(-1.0, 5, 5), r"arrival_s -1.0: .*at least 0"),
        (lambda: Request(math.nan, 5, 5), r"arrival_s nan: .*at least 0"),
        (lambda: Request(0.0, -5, 5), r"context_tokens -5.*at least 0"),
        (lambda: Request(0.0, 5, -5), r"generated_tokens -5.*at least 0"),
        (lambda: Request(0.0, 5, 5, turn=-1), r"turn -1: .*at least 0"),
        (lambda: Request(0.0, 5, 5, (Segment(0, 4),)), r"prompt has 4 tokens but context_tokens is 5: make"),
        (lambda: Request(0.0, 5, 5, (), Segment(0, 4)), r"reply has 4 tokens but generated_tokens is 5"),
        (lambda: Request(0.0, 5, 5, (Segment(2**31, 5),)), r"Segment\(id=2147483648.*ids are 0 to"),
        (lambda: Request(0.0, 5, 5, (Segment(0, 6), Segment(1, -1))), r"tokens=-1.*tokens 0 to"),
        (lambda: poisson(0, 1.0, CHAPTER_LOGNORMAL, CHAPTER_LOGNORMAL, seed=0), r"0 arrivals: .*at least 1"),
        (lambda: poisson(5, 0.0, CHAPTER_LOGNORMAL, CHAPTER_LOGNORMAL, seed=0), r"rate_per_s 0.0: .*above 0"),
        (lambda: chats(0, 1.0, seed=0), r"conversations 0: .*at least 1"),
        (lambda: chats(5, -1.0, seed=0), r"rate_per_s -1.0: .*above 0"),
        (lambda: chats(5, 1.0, seed=0, system_prompts=0), r"system_prompts 0: .*at least 1"),
        (lambda: chats(5, 1.0, seed=0, popularity=-1), r"popularity -1: .*at least 0"),
        (lambda: chats(5, 1.0, seed=0, mean_turns=0.5), r"mean_turns 0.5: .*at least 1"),
        (lambda: chats(5, 1.0, seed=0, think_s=math.inf), r"think_s inf: .*finite"),
        (lambda: chats(5, 1.0, seed=0, reply_s_per_token=-0.1), r"reply_s_per_token -0.1: .*at least 0"),
        (lambda: chats(5, 1.0, seed=0, max_tokens=10239), r"may have 10240 tokens .* is 10239: raise it"),
        (lambda: independent([0.0], [5, 6], [5]), r"zip\(\)"),
        (lambda: describe([]), r"at least one request"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_request_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request(0.0, 5, 5).arrival_s = 1.0


def test_describe_counts():
    requests = independent([2.0, 1.0, 6.0], [10, 30, 20], [1, 2, 6])
    summary = describe(requests)
    assert (summary.requests, summary.conversations) == (3, 0)
    assert (summary.duration_s, summary.rate_per_s) == (5.0, 2 / 5)
    assert dataclasses.astuple(summary.context) == (60, 20.0, 20.0, pytest.approx(29.8), 30)
    assert dataclasses.astuple(summary.generated) == (9, 3.0, 2.0, pytest.approx(5.92), 6)
    assert describe([Request(1.0, 5, 5)] * 3).rate_per_s == math.inf
    assert math.isnan(describe([Request(1.0, 5, 5)]).rate_per_s)
    trace = chats(7, 1.0, seed=0)
    assert describe(trace).conversations == 7 and describe(trace) == describe(trace[::-1])


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_describe_agrees_with_numpy(tokens):
    summary = describe(independent([0.0] * len(tokens), tokens, tokens[::-1])).context
    assert summary.total == sum(tokens) and summary.largest == max(tokens)
    assert summary.mean == pytest.approx(np.mean(tokens)) and summary.median == np.median(tokens)
    assert summary.p99 == pytest.approx(np.quantile(tokens, 0.99))
