// WGMMA: matrix products by a warpgroup, asynchronously. Wrappers of one instruction each; ptx.cuh includes them.
#pragma once

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of accumulators across a wait (WGMMA writes them behind its back).
template <int kCount>
__device__ __forceinline__ void wgmma_fence_operands(float (&reg)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(reg[i])::"memory");
}
// One cubin holds one element type.
#if MLA_BF16
#define MMA_TYPES "f32.bf16.bf16"
#else
#define MMA_TYPES "f32.f16.f16"
#endif

#define REGS_4 "%0, %1, %2, %3"
#define REGS_8 REGS_4 ", %4, %5, %6, %7"
#define REGS_16 REGS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REGS_32 REGS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGS_64 REGS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ACC_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC_8(d, i) ACC_4(d, i), ACC_4(d, i + 4)
#define ACC_16(d, i) ACC_8(d, i), ACC_8(d, i + 8)
#define ACC_32(d, i) ACC_16(d, i), ACC_16(d, i + 16)
#define ACC_64(d, i) ACC_32(d, i), ACC_32(d, i + 32)

// Upper word of every matrix descriptor: 128-byte swizzle, swizzle atoms of 1,024 bytes one after the other.
constexpr u64 kDescriptorHigh = (1ull << 62) | (1024ull >> 4 << 32);
// The same with atoms `stride` bytes one after the other.
__device__ __forceinline__ constexpr u64 descriptor_high(u32 stride) { return (1ull << 62) | (static_cast<u64>(stride >> 4) << 32); }

// d[64 x N] (+)= A[64 x 16] B[16 x N], A and B in shared memory, given by the lower words of descriptors (layout.cuh).
// kTransA / kTransB = 1: that operand is stored with its M (N) dimension contiguous. Strides: from one atom to the next.
#define WGMMA_SS(N, REGS, a_index, b_index, p_index, ta_index, tb_index)                                         \
    asm volatile(                                                                                                \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " p_index ", 0;\n"                                                      \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16." MMA_TYPES " {" REGS_##REGS "}, " a_index ", " b_index         \
        ", p, 1, 1, " ta_index ", " tb_index ";\n}\n"                                                            \
        : ACC_##REGS(d, 0)                                                                                       \
        : "l"(descriptor_high(stride_a) | a), "l"(descriptor_high(stride_b) | b), "r"(static_cast<int>(accumulate)), "n"(kTransA), "n"(kTransB))

template <int kN, int kTransA, int kTransB>
__device__ __forceinline__ void wgmma_ss(float (&d)[kN / 2], u32 a, u32 b, bool accumulate, u32 stride_a = 1024, u32 stride_b = 1024) {
    static_assert(kN == 8 || kN == 16 || kN == 32 || kN == 64 || kN == 128, "no wrapper for this N");
    if constexpr (kN == 8) WGMMA_SS(8, 4, "%4", "%5", "%6", "%7", "%8");
    if constexpr (kN == 16) WGMMA_SS(16, 8, "%8", "%9", "%10", "%11", "%12");
    if constexpr (kN == 32) WGMMA_SS(32, 16, "%16", "%17", "%18", "%19", "%20");
    if constexpr (kN == 64) WGMMA_SS(64, 32, "%32", "%33", "%34", "%35", "%36");
    if constexpr (kN == 128) WGMMA_SS(128, 64, "%64", "%65", "%66", "%67", "%68");
}

// The same with A in registers (fragment layout of the accumulators, two elements a register), N = 64, B as stored.
__device__ __forceinline__ void wgmma_rs_n64(float (&d)[32], const u32 (&a)[4], u32 b, bool accumulate, u32 stride_b = 1024) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." MMA_TYPES " {" REGS_32 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"
        : ACC_32(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor_high(stride_b) | b), "r"(static_cast<int>(accumulate)));
}

// d[64 x 64] (+)= A[64 x 16] B[16 x 64], both in shared memory in rows of 64 bytes: 64-byte swizzle, atoms of 512 bytes.
__device__ __forceinline__ void wgmma_ss_n64_narrow(float (&d)[32], u32 a, u32 b, bool accumulate) {
    constexpr u64 kHigh = (2ull << 62) | (512ull >> 4 << 32);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16." MMA_TYPES " {" REGS_32 "}, %32, %33, p, 1, 1, 0, 0;\n}\n"
        : ACC_32(d, 0)
        : "l"(kHigh | a), "l"(kHigh | b), "r"(static_cast<int>(accumulate)));
}

#define WIDE_40 REGS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WIDE_48 WIDE_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WIDE_56 WIDE_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WIDE_72 REGS_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WIDE_80 WIDE_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WIDE_88 WIDE_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WIDE_96 WIDE_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WIDE_128 WIDE_96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WIDE_32 REGS_32
#define WIDE_64 REGS_64
#define SUMS_32(d) ACC_32(d, 0)
#define SUMS_40(d) ACC_32(d, 0), ACC_8(d, 32)
#define SUMS_48(d) ACC_32(d, 0), ACC_16(d, 32)
#define SUMS_56(d) SUMS_48(d), ACC_8(d, 48)
#define SUMS_64(d) ACC_64(d, 0)
#define SUMS_80(d) ACC_64(d, 0), ACC_16(d, 64)
#define SUMS_88(d) SUMS_80(d), ACC_8(d, 80)
#define SUMS_96(d) ACC_64(d, 0), ACC_32(d, 64)
#define SUMS_128(d) ACC_64(d, 0), ACC_64(d, 64)

// d[64 x kN] (+)= A[64 x 16] B[16 x kN]: A of rows, in shared memory, and B, each with its K dimension contiguous.
#define WGMMA_SS_N(N, REGS, a_index, b_index, p_index)                                                            \
    asm volatile(                                                                                                 \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " p_index ", 0;\n"                                                        \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16." MMA_TYPES " {" WIDE_##REGS "}, " a_index ", " b_index          \
        ", p, 1, 1, 0, 0;\n}\n"                                                                                    \
        : SUMS_##REGS(d)                                                                                          \
        : "l"(kDescriptorHigh | a), "l"(kDescriptorHigh | b), "r"(static_cast<int>(accumulate)))

template <int kN>
__device__ __forceinline__ void wgmma_ss_n(float (&d)[kN / 2], u32 a, u32 b, bool accumulate) {
    static_assert(kN == 64 || kN == 80 || kN == 96 || kN == 112 || kN == 128 || kN == 160 || kN == 176 || kN == 192, "no wrapper");
    if constexpr (kN == 64) WGMMA_SS_N(64, 32, "%32", "%33", "%34");
    if constexpr (kN == 80) WGMMA_SS_N(80, 40, "%40", "%41", "%42");
    if constexpr (kN == 96) WGMMA_SS_N(96, 48, "%48", "%49", "%50");
    if constexpr (kN == 112) WGMMA_SS_N(112, 56, "%56", "%57", "%58");
    if constexpr (kN == 128) WGMMA_SS_N(128, 64, "%64", "%65", "%66");
    if constexpr (kN == 160) WGMMA_SS_N(160, 80, "%80", "%81", "%82");
    if constexpr (kN == 176) WGMMA_SS_N(176, 88, "%88", "%89", "%90");
    if constexpr (kN == 192) WGMMA_SS_N(192, 96, "%96", "%97", "%98");
}

// The same with A in registers (fragment layout of the accumulators, two elements a register), B's N dimension contiguous.
#define WGMMA_RS_N(N, REGS, a_index, b_index, p_index)                                                              \
    asm volatile(                                                                                                 \
        "{\n.reg .pred p;\nsetp.ne.b32 p, " p_index ", 0;\n"                                                        \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16." MMA_TYPES " {" WIDE_##REGS "}, {" a_index "}, " b_index           \
        ", p, 1, 1, 1;\n}\n"                                                                                       \
        : SUMS_##REGS(d)                                                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(kDescriptorHigh | b), "r"(static_cast<int>(accumulate)))

template <int kN>
__device__ __forceinline__ void wgmma_rs_n(float (&d)[kN / 2], const u32 (&a)[4], u32 b, bool accumulate) {
    static_assert(kN == 64 || kN == 128 || kN == 256, "no wrapper for this N");
    if constexpr (kN == 64) WGMMA_RS_N(64, 32, "%32, %33, %34, %35", "%36", "%37");
    if constexpr (kN == 128) WGMMA_RS_N(128, 64, "%64, %65, %66, %67", "%68", "%69");
    if constexpr (kN == 256) WGMMA_RS_N(256, 128, "%128, %129, %130, %131", "%132", "%133");
}
