"""Hopper kernels for Multi-head Latent Attention (MLA), and the study that measures them."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = [
    "DeviceUnavailable",
    "PagedKVCache",
    "merge_partials",
    "mla_append",
    "mla_decode",
    "mla_prefill",
    "mla_prefill_paged",
]

_HOMES = {
    "DeviceUnavailable": "mla_kernels.device",
    "PagedKVCache": "mla_kernels.paging",
    "merge_partials": "mla_kernels.decode",
    "mla_append": "mla_kernels.append",
    "mla_decode": "mla_kernels.decode",
    "mla_prefill": "mla_kernels.prefill",
    "mla_prefill_paged": "mla_kernels.chunked_prefill",
}


def __getattr__(name: str) -> object:
    """Imports an operator, and torch with it, at first use: reading records needs neither."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
