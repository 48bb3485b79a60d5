"""Datasheet figures of Hopper cards (``data/hardware.json``), to set beside what is measured."""

from __future__ import annotations

import json
import os
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .provenance import DATA
from .records import RecordError

HARDWARE = DATA / "hardware.json"
Positive = Annotated[float, Field(gt=0)]


class Hardware(BaseModel):
    """One card. ``bf16_tflops`` is dense; ``sources`` names where each figure was published."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    memory_gb: Positive
    bandwidth_tb_s: Positive
    bf16_tflops: Positive
    tdp_w: Positive
    l2_mb: Positive
    sms: Annotated[int, Field(gt=0)]
    sources: Annotated[list[str], Field(min_length=1)]


def load_hardware(path: str | os.PathLike = HARDWARE) -> dict[str, Hardware]:
    """Cards by name ("NVIDIA H200"). Raises RecordError naming the file and the field."""
    remedy = "restore the file from git"
    try:
        with open(path, encoding="utf-8") as file:
            cards = TypeAdapter(list[Hardware]).validate_python(json.load(file))
    except (OSError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise RecordError(path, "(file)", f"cannot be read: {error}", remedy) from None
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "(file)"
        raise RecordError(path, field, first["msg"], remedy) from None
    return {card.name: card for card in cards}
