"""Cubins onto the GPU: loading, tensor maps, argument packing, one launch on torch's current stream."""

import ctypes
import functools
import threading
from collections import OrderedDict

import torch

try:  # with this module, not in the first call: it takes a second
    import cupy
except ImportError:
    cupy = None  # no GPU build is installed, and nothing here is called

from mla_kernels.compiler import CompiledKernel, KernelConfig, compile_kernel

_CU_TENSOR_MAP_BFLOAT16, _CU_TENSOR_MAP_FLOAT16 = 9, 6
# Promotion to 256 bytes, twice a box's line, costs 5 to 6 % of the bandwidth: 4.20 TB/s, not 4.44 (H200).
_CU_SWIZZLE_64B, _CU_SWIZZLE_128B, _CU_L2_PROMOTION_128B = 2, 3, 2
_CU_LAUNCH_ATTRIBUTE_COOPERATIVE, _CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC = 2, 6


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class DecodeParams(ctypes.Structure):
    """``DecodeParams`` of cuda/schedule.cuh, field by field."""

    _fields_ = (
        ("kv_map", ctypes.c_uint64 * 16),
        ("q_map", ctypes.c_uint64 * 16),
        ("out", ctypes.c_uint64),
        ("lse", ctypes.c_uint64),
        ("block_table", ctypes.c_uint64),
        ("cache_seqlens", ctypes.c_uint64),
        ("partials", ctypes.c_uint64),
        ("arrivals", ctypes.c_uint64),
        ("softmax_scale_log2", ctypes.c_float),
        ("b", ctypes.c_int),
        ("s_q", ctypes.c_int),
        ("h_q", ctypes.c_int),
        ("num_pages", ctypes.c_int),
        ("max_pages", ctypes.c_int),
        ("table_stride", ctypes.c_int),
        ("row_blocks", ctypes.c_int),
        ("row_groups", ctypes.c_int),
        ("causal", ctypes.c_int),
        ("items_each", ctypes.c_int),
        ("item_parts", ctypes.c_int),
        ("cu_seqlens_q", ctypes.c_uint64),
        ("page_shift", ctypes.c_int),
        ("max_tokens", ctypes.c_int),
        ("total_q", ctypes.c_int),
        ("pad", ctypes.c_char * 12),
        # Read where pages come in pieces, and by pairs of CTAs; the last by pairs only.
        ("rotary_map", ctypes.c_uint64 * 16),
        ("q_rotary_map", ctypes.c_uint64 * 16),
    )


class DriverError(RuntimeError):
    """The CUDA driver refused a call; the message names the call and the driver's reason."""


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"libcuda.so.1 cannot be loaded ({error}): install an NVIDIA driver") from error


def _check(status: int, call: str) -> None:
    if status:
        reason = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(reason))
        text = reason.value.decode() if reason.value else "unknown"
        raise DriverError(f"{call} failed with {status}: {text}")


@functools.cache
def sm_count(device: int) -> int:
    """Multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class LoadedKernel:
    """A cubin on one device, ready to launch: what does not change between calls is packed once."""

    def __init__(self, compiled: CompiledKernel, entry: str, device: int, attributes: tuple[int, ...]):
        self.compiled = compiled
        with cupy.cuda.Device(device):
            self._module = cupy.RawModule(path=str(compiled.path))
            raw = self._module.get_function(entry)
            if compiled.config.shared_bytes:
                raw.max_dynamic_shared_size_bytes = compiled.config.shared_bytes
            self._function = ctypes.c_void_p(raw.kernel.ptr)
        self._attributes = (_LaunchAttribute * len(attributes))(
            *(_LaunchAttribute(id=i, value=1) for i in attributes)
        )
        self._config = _LaunchConfig(shared_bytes=compiled.config.shared_bytes)
        self._config.block[:] = (compiled.config.threads, 1, 1)
        self._config.grid[2] = 1
        self._config.attributes = self._attributes
        self._config.attribute_count = len(attributes)
        self._config_ref = ctypes.byref(self._config)
        self._launch = _driver().cuLaunchKernelEx
        self._lock = threading.Lock()  # the packed launch configuration is shared

    def launch(self, grid: tuple[int, int], stream: int, arguments: ctypes.Array) -> None:
        """``arguments``: array of pointers to the kernel's parameters."""
        with self._lock:
            self._config.grid[0], self._config.grid[1] = grid
            self._config.stream = stream
            status = self._launch(self._config_ref, self._function, arguments, None)
        if status:
            _check(status, f"launch of {self.compiled.config.name}")


_PERSISTENT = (_CU_LAUNCH_ATTRIBUTE_COOPERATIVE, _CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC)
_loaded: dict[tuple[KernelConfig, int], LoadedKernel] = {}
_loading = threading.Lock()


def load(config: KernelConfig, entry: str, device: int, *, persistent: bool) -> LoadedKernel:
    """The kernel of ``config`` on ``device``, compiled and loaded at the first call.

    ``persistent``: all its CTAs are resident at once (cooperative launch), and where ``config.programmatic``
    it may start before the kernel ahead of it in the stream has ended: it waits for that end by itself.
    """
    key = (config, device)
    kernel = _loaded.get(key)
    if kernel is None:
        with _loading:
            kernel = _loaded.get(key)
            if kernel is None:
                attributes = _PERSISTENT if persistent else ()
                if not config.programmatic:
                    attributes = tuple(a for a in attributes if a != _CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC)
                kernel = _loaded[key] = LoadedKernel(compile_kernel(config), entry, device, attributes)
    return kernel


def kv_tensor_map(kv_cache: torch.Tensor, columns: int = 64) -> ctypes.Array:
    """Tensor map of a page pool (num_pages, page_size, [1,] 576): boxes of 64 tokens or of a page."""
    num_pages, page_size = kv_cache.shape[:2]
    strides = (kv_cache.stride(1), kv_cache.stride(0))
    return _tensor_map(kv_cache, (page_size, num_pages), strides, min(page_size, 64), columns)


def kv_pieces_map(kv_cache: torch.Tensor) -> ctypes.Array:
    """The same pool, of pages of at least 8, as (64 columns, 8 tokens, 9, page_size / 8, num_pages).

    A box is four times 64 columns of 64 tokens or of a page: a piece of a group of cuda/producer.cuh.
    """
    num_pages, page_size = kv_cache.shape[:2]
    token, page = kv_cache.stride(1), kv_cache.stride(0)
    sizes, strides = (
        (64, 8, kv_cache.shape[-1] // 64, page_size // 8, num_pages),
        (token, 64, 8 * token, page),
    )
    return tensor_map(kv_cache.data_ptr(), kv_cache.dtype, sizes, strides, 8, 4, min(page_size, 64) // 8)


def token_pool(kv_cache: torch.Tensor, q: torch.Tensor) -> ctypes.Array:
    """``TokenPool`` of cuda/schedule.cuh, in the place of the pool's tensor map."""
    addresses = (kv_cache.data_ptr(), q.data_ptr(), kv_cache.stride(0), kv_cache.stride(1))
    return (ctypes.c_uint64 * 16)(*addresses)


def query_tensor_map(q: torch.Tensor, rows: int, columns: int = 64) -> ctypes.Array:
    """Tensor map of queries (b, s_q, h_q, 576), contiguous: boxes of ``rows`` of a sequence's rows."""
    b, s_q, h_q, width = q.shape
    return _tensor_map(q, (s_q * h_q, b), (width, s_q * h_q * width), rows, columns)


def flat_query_tensor_map(q: torch.Tensor, rows: int, columns: int = 64) -> ctypes.Array:
    """The same of all sequences' rows end to end, (total_q * h_q, 576) in any shape: of ragged queries."""
    width = q.shape[-1]
    total = q.numel() // width
    return _tensor_map(q, (total, 1), (width, total * width), rows, columns)


def _tensor_map(
    tensor: torch.Tensor, sizes: tuple[int, int], strides: tuple[int, int], rows: int, columns: int
) -> ctypes.Array:
    """Map of (576 columns, *sizes), strides in elements: boxes of ``columns`` x ``rows``."""
    sizes = (tensor.shape[-1], *sizes)
    return tensor_map(tensor.data_ptr(), tensor.dtype, sizes, strides, rows, columns=columns)


def tensor_map(
    address: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    *box: int,
    columns: int = 64,
) -> ctypes.Array:
    """Tensor map of 16-bit elements at ``address``: boxes of ``columns`` x ``box``.

    64 columns, 128-byte swizzle, or 32, 64-byte swizzle.

    ``sizes`` from the innermost dimension, whose elements are contiguous; ``strides`` in elements, of the
    others. ``box``: from the second dimension on, 1 where it is left out. Parts of a box outside the tensor
    are zero.
    """
    rank = len(sizes)
    storage = (ctypes.c_uint64 * 32)()  # room to align by hand: the driver wants 64 bytes
    aligned = (ctypes.addressof(storage) + 127) // 128 * 128
    element = _CU_TENSOR_MAP_BFLOAT16 if dtype == torch.bfloat16 else _CU_TENSOR_MAP_FLOAT16
    status = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned),
        ctypes.c_int(element),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*(stride * 2 for stride in strides)),
        (ctypes.c_uint32 * rank)(columns, *box, *(1,) * (rank - 1 - len(box))),
        (ctypes.c_uint32 * rank)(*(1,) * rank),
        ctypes.c_int(0),
        ctypes.c_int(_CU_SWIZZLE_128B if columns == 64 else _CU_SWIZZLE_64B),
        ctypes.c_int(_CU_L2_PROMOTION_128B),
        ctypes.c_int(0),
    )
    _check(status, f"cuTensorMapEncodeTiled of sizes {sizes}, strides {strides}")
    return (ctypes.c_uint64 * 16).from_buffer_copy(ctypes.string_at(aligned, 128))


def current_stream(device: int) -> int:
    """Handle of torch's current stream on ``device``."""
    return torch._C._cuda_getCurrentRawStream(device)  # what torch.compile's own launchers use; 10x cheaper


_ARENA_SLOTS = 4096
_STREAMS_KEPT = 8


class Workspace:
    """Where launches leave the parts of split items, and count those that have arrived.

    The counters, two a CTA, are zero between launches (each leaves them as it found them). Launches that may
    run at the same time need counters and room of their own: one slot a stream for eager calls, and one a
    stream of each CUDA graph, which may be replayed beside anything. ``lock`` is held from ``addresses`` to
    the launch, so that room is not given away in between.
    """

    def __init__(self, device: int):
        self._device = torch.device("cuda", device)
        self._bytes = sm_count(device) * 8
        self._counters: dict[tuple[int, int], int] = {}  # (capture id or 0, stream) -> address
        # (stream, bytes) -> what was said to it, and the room that it has
        self._eager: OrderedDict[tuple[int, int], tuple[tuple[int, int], torch.Tensor]] = OrderedDict()
        self._kept: list[torch.Tensor] = []  # alive as long as a graph may be replayed
        self._free: list[int] = []
        self.lock = threading.Lock()

    def addresses(self, stream: int, part_bytes: int) -> tuple[int, int]:
        """(parts, counters) of a launch on ``stream``, the current one: of the graph being captured there or
        of eager calls."""
        if torch._C._cuda_isCurrentStreamCapturing():
            # of the graph's pool, which gives it to the next launch of the graph
            parts = torch.empty(part_bytes, dtype=torch.uint8, device=self._device)
            return parts.data_ptr(), self._counters_of(capture_id(stream), stream)
        found = self._eager.get((stream, part_bytes))
        if found is None:
            parts = torch.empty(part_bytes, dtype=torch.uint8, device=self._device)
            found = self._eager[stream, part_bytes] = (parts.data_ptr(), self._counters_of(0, stream)), parts
            if len(self._eager) > _STREAMS_KEPT:
                self._eager.popitem(last=False)  # its stream's next allocation comes after its launches
        return found[0]

    def _counters_of(self, capture: int, stream: int) -> int:
        counters = self._counters.get((capture, stream))
        if counters is None:
            counters = self._counters[capture, stream] = self._take(capturing=capture != 0)
        return counters

    def _take(self, capturing: bool) -> int:
        if not self._free:
            # Under capture the zeros become a memset node of that graph: correct there, so it gets one slot.
            count = 1 if capturing else _ARENA_SLOTS
            arena = torch.zeros(count * self._bytes, dtype=torch.uint8, device=self._device)
            if not capturing:
                # zero before another stream uses a slot
                torch.cuda.current_stream(self._device).synchronize()
            self._kept.append(arena)
            self._free = [arena.data_ptr() + i * self._bytes for i in reversed(range(count))]
        return self._free.pop()


def capture_id(stream: int) -> int:
    """Id of the CUDA graph capture that ``stream`` is in, 0 outside one."""
    status, identity = ctypes.c_int(), ctypes.c_uint64()
    call = _driver().cuStreamGetCaptureInfo_v2
    _check(
        call(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(identity), None, None, None),
        "cuStreamGetCaptureInfo",
    )
    return identity.value if status.value == 1 else 0


_bound = threading.local()


def bind(device: int) -> None:
    """Makes ``device``'s context current: a thread whose first CUDA call is a launch has none."""
    if device not in getattr(_bound, "devices", ()):
        cupy.cuda.Device(device).use()
        _bound.devices = {*getattr(_bound, "devices", ()), device}


@functools.cache
def workspace(device: int) -> Workspace:
    return Workspace(device)


STREAM_READ = KernelConfig("stream_read.cu", (("MLA_BF16", 1),), "stream_read", shared_bytes=0, threads=512)


@functools.cache
def _sink(device: int) -> torch.Tensor:
    return torch.empty(4, dtype=torch.int32, device=torch.device("cuda", device))


def stream_read(tensor: torch.Tensor) -> None:
    """Reads a contiguous CUDA tensor once and writes nothing: the read-only bandwidth ceiling."""
    device = tensor.device.index
    kernel = load(STREAM_READ, "stream_read", device, persistent=False)
    values = (
        ctypes.c_uint64(tensor.data_ptr()),
        ctypes.c_uint64(tensor.numel() * tensor.element_size() // 16),
        ctypes.c_uint64(_sink(device).data_ptr()),
    )
    pointers = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
    kernel.launch((2 * sm_count(device), 1), current_stream(device), pointers)


def cuda_malloc(size: int) -> int:
    """Address of ``size`` bytes that cudaMalloc gives on the current device."""
    return cupy.cuda.runtime.malloc(size)


def cuda_free(address: int) -> None:
    """Gives them back by cudaFree, which waits for the GPU."""
    cupy.cuda.runtime.free(address)
