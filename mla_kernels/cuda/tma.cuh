// Loads by TMA of what is read once, a part of ptx.cuh: pages and queries.
#pragma once

// L2's policy for what is read once, and so makes way first (what createpolicy.fractional.L2::evict_first gives of all of it).
// Else KV pushes everything out of the L2: queries, page tables, parts, and the kernel's own code, which the next launch then
// gets from HBM. (64 heads, b 16, kv 4096: 41.1 us instead of 46.5; b 128: 214 instead of 218; one H100, log of 2026-11-27.)
constexpr u64 kEvictFirst = 0x12F0000000000000;

// Box at (x, y, z) of a rank-3 tensor -> shared memory; completes `barrier` by its bytes. Out-of-range parts are zero.
__device__ __forceinline__ void tma_load_3d(void* smem, const TensorMap* map, u64* barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], "
        "%6;" ::"r"(smem_address(smem)),
        "l"(map), "r"(smem_address(barrier)), "r"(x), "r"(y), "r"(z), "l"(kEvictFirst)
        : "memory");
}

// Box at (x, y, z, u, v) of a rank-5 tensor, likewise.
__device__ __forceinline__ void tma_load_5d(void* smem, const TensorMap* map, u64* barrier, int x, int y, int z, int u, int v) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], "
        "[%2], %8;" ::"r"(smem_address(smem)),
        "l"(map), "r"(smem_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(u), "r"(v), "l"(kEvictFirst)
        : "memory");
}
