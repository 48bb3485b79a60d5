"""The paged latent KV cache: who owns which page, on the host; the pool and its tables, on the device."""

from mla_kernels.paging.allocator import OutOfPages, PageAllocator
from mla_kernels.paging.cache import PagedKVCache
from mla_kernels.paging.rows import OutOfSequences
from mla_kernels.paging.slots import Slots, slot_mapping
from mla_kernels.paging.usage import Usage

__all__ = ["OutOfPages", "OutOfSequences", "PageAllocator", "PagedKVCache", "Slots", "Usage", "slot_mapping"]
