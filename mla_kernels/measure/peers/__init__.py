"""Other people's attention behind one interface, by name: "peer:flash_mla" is ``PEERS["flash_mla"]``.

Nothing outside this folder knows a peer. Their code comes from public wheels (``make peers``) into
``.peers/`` and is loaded from there; a peer that is not there, or cannot run, says why.
"""

from __future__ import annotations

from ..records import PEER
from . import fa2_decompressed, fa3, flash_mla, flashinfer, portable, prefill, torch_model, vllm_triton
from .interface import Peer, PeerUnavailable

PEERS: dict[str, Peer] = {
    "flash_mla": flash_mla.FlashMLA(),
    "fa3": fa3.FA3(),
    "flashinfer_fa3": flashinfer.FlashInfer("fa3"),
    "flashinfer_fa2": flashinfer.FlashInfer("fa2"),
    "fa2_decompressed": fa2_decompressed.FA2Decompressed(),
    "vllm_triton": vllm_triton.VllmTriton(),
    "portable": portable.Portable(),
    "torch_absorbed": torch_model.TorchAbsorbed(),
    "torch_decompressed": torch_model.TorchDecompressed(),
}
FAST = ("flash_mla", "fa3", "flashinfer_fa3", "flashinfer_fa2")  # written for MLA decode on this GPU
SLOW = tuple(name for name in PEERS if name not in FAST)
PREFILL_PEERS: dict[str, Peer] = {
    "prefill_fa3": prefill.PrefillFA3(),
    "prefill_cudnn": prefill.PrefillCuDNN(),
    "prefill_fa2": prefill.PrefillFA2(),
    "prefill_math": prefill.PrefillMath(),
}
_ALL = PEERS | PREFILL_PEERS


def find(implementation: str) -> Peer:
    """The peer of a name with its prefix. Raises ValueError for one that is none, PeerUnavailable where it
    cannot be used here."""
    name = implementation.removeprefix(PEER)
    if name not in _ALL:
        raise ValueError(f"peer {name!r} is unknown; known are {', '.join(_ALL)}")
    if reason := _ALL[name].available():
        raise PeerUnavailable(reason)
    return _ALL[name]


def prepare(names: tuple[str, ...], dtypes: tuple[str, ...], progress=print) -> dict[str, str]:
    """Load and compile what ``names`` (without prefix) need, so that no measurement waits for it.

    Returns the reason of each that cannot be used.
    """
    missing = {}
    for name in names:
        try:
            find(name).prepare(dtypes)
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
        progress(f"peer {name}: {missing.get(name, 'ready')}")
    return missing
