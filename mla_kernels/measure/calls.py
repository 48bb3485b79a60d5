"""What one call is asked to do: a decode step over a paged latent cache, or prefill over whole sequences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .measurements import Count, Section

Positive = Annotated[int, Field(gt=0)]


class Workload(Section):
    """One decode call: ``mean_len`` and ``sd_len`` were asked for, ``lengths`` (KV tokens) drawn."""

    b: Positive
    h_q: Positive
    s_q: Positive
    dtype: Literal["bf16", "fp16"] = "bf16"
    causal: bool = False
    page_size: Positive = 64
    lengths_kind: Literal["uniform", "normal", "lognormal", "explicit"] = "uniform"
    mean_len: Annotated[float, Field(ge=0)]
    sd_len: Annotated[float, Field(ge=0)] = 0.0
    lengths: tuple[Count, ...]  # a tuple, so that a workload can be a key

    @model_validator(mode="after")
    def _check(self) -> Workload:
        if len(self.lengths) != self.b:
            raise ValueError(f"b is {self.b} but lengths holds {len(self.lengths)} values")
        return self


class PrefillWorkload(Section):
    """One prefill call: sequence i has ``lengths_q[i]`` query tokens and ``lengths_k[i]`` keys.

    ``ragged``: the sequences lie end to end and the call gets their bounds (cu_seqlens), else all are of one
    length. ``causal`` is aligned at the bottom right: the last query token sees every key. ``mean_len`` and
    ``sd_len`` were asked for.
    """

    b: Positive
    h_q: Positive
    h_kv: Positive
    d_qk: Positive
    d_v: Positive
    dtype: Literal["bf16", "fp16"] = "bf16"
    causal: bool = False
    ragged: bool = False
    lengths_kind: Literal["uniform", "lognormal", "explicit"] = "uniform"
    mean_len: Annotated[float, Field(ge=0)]
    sd_len: Annotated[float, Field(ge=0)] = 0.0
    lengths_q: tuple[Count, ...]
    lengths_k: tuple[Count, ...]

    @model_validator(mode="after")
    def _check(self) -> PrefillWorkload:
        for name in ("lengths_q", "lengths_k"):
            lengths = getattr(self, name)
            if len(lengths) != self.b:
                raise ValueError(f"b is {self.b} but {name} holds {len(lengths)} values")
            if not self.ragged and len(set(lengths)) > 1:
                raise ValueError(f"{name} differ, so `ragged` must be true")
        if self.h_q % self.h_kv:
            raise ValueError(f"h_q is {self.h_q}, must be a multiple of h_kv, {self.h_kv}")
        return self
