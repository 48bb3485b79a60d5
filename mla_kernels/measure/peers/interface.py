"""What every peer offers, and what they share."""

from __future__ import annotations

import abc
import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..bound import Bound
from ..provenance import ROOT
from ..workloads import Inputs

if TYPE_CHECKING:
    import torch

HOME_VARIABLE = "MLA_KERNELS_PEERS"
REMEDY = "run `make peers`"


class PeerUnavailable(NotImplementedError):
    """A peer cannot be used here; a point that wanted it is skipped with this reason."""


class Peer(abc.ABC):
    """Somebody's MLA decode, or prefill. ``source`` says where it comes from, in words for a table."""

    source: str

    @abc.abstractmethod
    def available(self) -> str | None:
        """Why it cannot be used on this machine, None where it can."""

    def prepare(self, dtypes: tuple[str, ...]) -> None:  # noqa: B027 (most need nothing)
        """Load and compile what takes time. ``dtypes`` of "bf16", "fp16"."""

    @abc.abstractmethod
    def bind(self, inputs: Inputs) -> Bound:
        """Calls on these inputs; plans are made here. Raises NotImplementedError for what it does not do."""


def home() -> Path:
    """Folder that ``make peers`` fills: ``.peers``, or what ``MLA_KERNELS_PEERS`` names."""
    return Path(os.environ.get(HOME_VARIABLE) or ROOT / ".peers")


def missing(*paths: str) -> str | None:
    """Why peers of these files (patterns in ``home()``) cannot be used, None if all are there."""
    absent = [path for path in paths if not any(home().glob(path))]
    return f"{absent[0]} is not among the fetched peers: {REMEDY}" if absent else no_gpu()


def no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "there is no CUDA device"


@functools.cache
def load_operators(path: str, namespace: str) -> object:
    """``torch.ops.<namespace>`` after loading the library at ``path`` in ``home()``."""
    import torch

    torch.ops.load_library(str(home() / path))
    return getattr(torch.ops, namespace)


def require(condition: bool, text: str) -> None:
    """NotImplementedError with ``text`` unless ``condition``."""
    if not condition:
        raise NotImplementedError(text)


def starts(inputs: Inputs) -> torch.Tensor:
    """(b + 1,) int32: where the query tokens of each sequence start when all are laid end to end."""
    import torch

    workload = inputs.workload
    return torch.arange(
        0, (workload.b + 1) * workload.s_q, workload.s_q, dtype=torch.int32, device=inputs.q.device
    )


def per_sequence(lse: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """(h_q, b * s_q) -> (b, h_q, s_q)."""
    workload = inputs.workload
    return lse.view(workload.h_q, workload.b, workload.s_q).transpose(0, 1)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
