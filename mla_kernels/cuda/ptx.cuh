// Every asm statement of the project: one instruction a wrapper, named after the instruction (included here: WGMMA, wgmma.cuh, and
// loads of what is read once, tma.cuh).
// PTX ISA 9.0, target sm_90a. Shared-memory addresses are 32-bit (`smem_address`).
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);  // NVRTC has no <math.h> constants
constexpr float kNan = __builtin_bit_cast(float, 0x7fffffff);

// NVRTC has no <cuda.h>: the 128-byte tensor map is declared here and filled on the host by cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ u32 smem_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// The same value, of unknown origin: what is derived from it is computed where it stands, instead of being hoisted over
// the main loop into registers that the accumulators need.
__device__ __forceinline__ u32 launder(u32 value) {
    asm volatile("" : "+r"(value));
    return value;
}

// The same value, in a uniform register. What branches, waits and descriptors depend on must be known to be the same in a warp:
// else ptxas takes ordinary registers for it, and two moves to uniform ones for each WGMMA. (`uniform` tells it less, but
// costs less; lanes that differ give nonsense here.)
__device__ __forceinline__ u32 in_uniform(u32 value) { return __reduce_or_sync(0xffffffffu, value); }

// The same value, known to be the same in every lane: what is derived from it lives in uniform registers.
__device__ __forceinline__ u32 uniform(u32 value) { return __shfl_sync(0xffffffffu, value, 0); }

// ---- mbarrier: producer and consumers hand buffers to each other -------------------------------------------------

__device__ __forceinline__ void mbarrier_init(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(u64* barrier, u32 count = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
                 : "memory");
}

// Waits until the phase of parity `parity` has completed.
__device__ __forceinline__ void mbarrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "wait:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra wait;\n"
        "}\n" ::"r"(smem_address(barrier)),
        "r"(parity)
        : "memory");
}

// ---- named barriers: a warpgroup, or both consumer warpgroups ----------------------------------------------------

__device__ __forceinline__ void named_barrier_sync(u32 id, u32 threads) {
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Barrier and OR-reduction of `vote` over its threads in one instruction.
__device__ __forceinline__ bool named_barrier_any(u32 id, u32 threads, bool vote) {
    u32 any;
    asm volatile(
        "{\n"
        ".reg .pred in, out;\n"
        "setp.ne.u32 in, %3, 0;\n"
        "barrier.cta.red.or.pred out, %1, %2, in;\n"
        "selp.u32 %0, 1, 0, out;\n"
        "}\n"
        : "=r"(any)
        : "r"(id), "r"(threads), "r"(static_cast<u32>(vote))
        : "memory");
    return any != 0;
}

// Counts this warp in at a named barrier without waiting.
__device__ __forceinline__ void named_barrier_arrive(u32 id, u32 threads) {
    asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- a cluster of two CTAs: shared memory of the other ------------------------------------------------------------

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Where this CTA's `address` is in CTA `rank` of the cluster.
__device__ __forceinline__ u32 map_shared(u32 address, u32 rank) {
    u32 mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

// 16 bytes into another CTA's shared memory; completes its `barrier` by them.
__device__ __forceinline__ void store_async(u32 address, u32 barrier, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(address),
                 "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// All threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive;" ::: "memory");
    asm volatile("barrier.cluster.wait;" ::: "memory");
}

// The same value, defined here: operands of a WGMMA in flight must not be where the next ones come to be (C7513).
__device__ __forceinline__ u32 moved(u32 value) {
    u32 copy;
    asm volatile("mov.b32 %0, %1;" : "=r"(copy) : "r"(value) : "memory");
    return copy;
}

// ---- TMA ---------------------------------------------------------------------------------------------------------

#ifndef MLA_KEYS  // prefill's: its tiles are read again and again
#include "tma.cuh"
#endif

// Box at (x, y, z, w) of a rank-4 tensor -> shared memory; completes `barrier` by its bytes. Out-of-range parts are zero.
__device__ __forceinline__ void tma_load_4d(void* smem, const TensorMap* map, u64* barrier, int x, int y, int z, int w) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            smem_address(smem)),
        "l"(map), "r"(smem_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
        : "memory");
}

// 16 bytes, by this thread; `copy_async_wait<n>`: all but the last n groups that it committed are there.
__device__ __forceinline__ void copy_async(void* smem, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_address(smem)), "l"(from) : "memory");
}
// The same of `bytes` (0 or 16), the rest zeros. `copy_async_arrive`: one arrival at `barrier` when all copies that this
// thread began before are there.
__device__ __forceinline__ void copy_async_or_zero(void* smem, const void* from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address(smem)), "l"(from), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_async_arrive(u64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Orders ordinary shared-memory writes of this thread before later reads by WGMMA and TMA.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#include "wgmma.cuh"

// ---- fragments ---------------------------------------------------------------------------------------------------

// Two fp32 -> two 16-bit elements in one register, `low` in the lower half.
__device__ __forceinline__ u32 pack_elements(float low, float high) {
    u32 packed;
#if MLA_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
    return packed;
}

// The two elements of a register.
__device__ __forceinline__ float2 unpack_elements(u32 packed) {
#if MLA_BF16
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
#else
    float2 v;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}\n" : "=f"(v.x), "=f"(v.y) : "r"(packed));
    return v;
#endif
}

// Two fp32 -> two fp16 in one register, whatever the elements are, and back.
__device__ __forceinline__ u32 pack_halves(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ float2 unpack_halves(u32 packed) {
    float2 v;
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}\n" : "=f"(v.x), "=f"(v.y) : "r"(packed));
    return v;
}

// Element i of thread t of four neighbours -> element t of thread i.
__device__ __forceinline__ uint4 transposed(u32 thread, u32 a, u32 b, u32 c, u32 d) {
    const auto swap = [thread](u32 bit, u32& x, u32& y) {
        const bool upper = thread & bit;
        const u32 other = __shfl_xor_sync(0xffffffffu, upper ? x : y, bit);
        (upper ? x : y) = other;
    };
    swap(1, a, b), swap(1, c, d), swap(2, a, c), swap(2, b, d);
    return make_uint4(a, b, c, d);
}

// Four 8x8 blocks of 16-bit elements, registers -> shared memory; lane l gives the address of row l % 8 of block l / 8.
__device__ __forceinline__ void stmatrix_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
                 "r"(d)
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x4_trans(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x2_trans(u32 address, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

// Four 8x8 blocks, shared memory -> registers; lane l gives the address of row l % 8 of block l / 8.
__device__ __forceinline__ void ldmatrix_x4(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// Transposes an 8x8 block of 16-bit elements held by a warp.
__device__ __forceinline__ u32 movmatrix_trans(u32 a) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- registers, memory order -------------------------------------------------------------------------------------

// Programmatic dependent launch: the next kernel of the stream may start when all CTAs have said so, and waits for this one's
// end before it touches memory.
__device__ __forceinline__ void griddepcontrol_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ u32 load_acquire(const u32* pointer) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(pointer) : "memory");
    return value;
}

// After what this thread's warp has written, if it has met since.
__device__ __forceinline__ void red_add_release(u32* pointer, u32 value) {
    asm volatile("red.add.release.gpu.global.u32 [%0], %1;" ::"l"(pointer), "r"(value) : "memory");
}

__device__ __forceinline__ u32 atomic_add_relaxed(u32* pointer, u32 value) {
    u32 old;
    asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(pointer), "r"(value) : "memory");
    return old;
}

// 16 bytes past L1 (streamed once).
__device__ __forceinline__ uint4 load_streaming(const uint4* pointer) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(pointer));
    return v;
}
