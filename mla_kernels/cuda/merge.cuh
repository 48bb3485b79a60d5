// Items that are split between CTAs: partial results in global memory, merged in the same launch.
//
// A part is O (unnormalised) and, per row, the reference exponent m and the sum l = sum 2^(s - m). Part 0 is the last
// item of its CTA's share, every other part the first of its own. So with few parts the others are long done when
// part 0 is: its CTA absorbs them into its registers and writes the result. With many parts (few, long sequences) every
// CTA leaves its part, and when its share is done merges 1/n-th of the rows. Always in the same order: results do not
// depend on timing. The launch is cooperative: every CTA waited for is resident.
#pragma once
#include "schedule.cuh"
#include "softmax.cuh"

constexpr float kLn2 = 0.693147180559945309f;
constexpr int kVectors = kHeadDimV / 4;  // float4 a row

template <int kRows>
struct PartialSlot {
    float4 o[kRows][kVectors];
    float2 stats[kRows];  // (m, l), m in units of log2
};

template <int kRows>
__device__ __forceinline__ PartialSlot<kRows>& partial_slot(const DecodeParams& p, int first_cta, int part) {
    auto* slots = reinterpret_cast<PartialSlot<kRows>*>(p.partials);
    return slots[2 * (first_cta + part * p.group) + (part == 0)];
}

__device__ __forceinline__ int part_of_this_cta(const DecodeParams& p, const WorkItem& w) {
    return (static_cast<int>(blockIdx.x) - w.first_cta) / p.group;
}

// 1 / l, 0 for a row that sees no token, NaN for a row that must be NaN.
__device__ __forceinline__ float inverse_sum(float l) { return l > 0.f ? 1.f / l : l; }

// Natural-log LSE of a row from its reference (log2 units) and sum.
__device__ __forceinline__ float natural_lse(float m, float l) {
    return l == 0.f ? -kInfinity : fmaf(m, kLn2, logf(l));
}

__device__ __forceinline__ void store_lse(const DecodeParams& p, int request, int row, float lse) {
    const int s = row / p.h_q, h = row - s * p.h_q;
    p.lse[(static_cast<long long>(request) * p.h_q + h) * p.s_q + s] = lse;
}

__device__ __forceinline__ u16* out_row(const DecodeParams& p, int request, int row) {
    return p.out + (static_cast<long long>(request) * p.s_q * p.h_q + row) * kHeadDimV;
}

// An item without tiles: zero and -inf for an empty sequence, NaN for a length outside the page table.
template <int kRows>
__device__ __forceinline__ void write_empty(const DecodeParams& p, const WorkItem& w) {
    const int rows = min(kRows, p.s_q * p.h_q - w.row_block * kRows);
    const float fill = w.invalid ? kNan : 0.f;
    const u32 packed = pack_elements(fill, fill);
    const int thread = launder(threadIdx.x);
    for (int i = thread; i < rows * kVectors; i += kConsumers) {
        u16* row = out_row(p, w.request, w.row_block * kRows + i / kVectors);
        reinterpret_cast<uint2*>(row)[i % kVectors] = make_uint2(packed, packed);
    }
    for (int r = thread; r < rows; r += kConsumers)
        store_lse(p, w.request, w.row_block * kRows + r, w.invalid ? kNan : -kInfinity);
}

constexpr int kAbsorbedParts = 4;

// Whether this CTA finishes a split item of few parts.
__device__ __forceinline__ bool absorbs(const DecodeParams& p, const WorkItem& w) {
    return w.parts <= kAbsorbedParts && part_of_this_cta(p, w) == 0;
}

__device__ __forceinline__ void spin_until(const u32* counter, int count) {
    while (load_acquire(counter) < static_cast<u32>(count)) {
    }
}

// Called by all consumers of the CTA that absorbs `w`'s other parts.
__device__ __forceinline__ void wait_for_parts(const DecodeParams& p, const WorkItem& w) {
    if (threadIdx.x == 0) {
        spin_until(&p.arrivals[2 * w.first_cta], w.parts - 1);
        p.arrivals[2 * w.first_cta] = 0;  // as the next launch expects it
    }
    named_barrier_sync(kBarrierConsumers, kConsumers);
}

// Weights that join this CTA's part of a row with `others` parts left by other CTAs.
template <int kRows>
struct AbsorbedRow {
    float own, other[kAbsorbedParts - 1], lse;

    __device__ AbsorbedRow(const DecodeParams& p, const WorkItem& w, int row, int others, float m, float l) {
        float2 stats[kAbsorbedParts - 1];
        float joint = m;
#pragma unroll
        for (int k = 0; k < kAbsorbedParts - 1; ++k) {
            stats[k] = k < others ? partial_slot<kRows>(p, w.first_cta, k + 1).stats[row] : make_float2(-kInfinity, 0.f);
            joint = fmaxf(joint, stats[k].x);
        }
        own = rescale_factor(m, joint);
        float sum = l * own;
#pragma unroll
        for (int k = 0; k < kAbsorbedParts - 1; ++k) {
            other[k] = rescale_factor(stats[k].x, joint);
            sum = fmaf(stats[k].y, other[k], sum);
        }
        const float inverse = inverse_sum(sum);
        own *= inverse;
#pragma unroll
        for (int k = 0; k < kAbsorbedParts - 1; ++k) other[k] *= inverse;
        lse = natural_lse(joint, sum);
    }
};

// The split items of many parts that this CTA takes part in, to be merged when its share is done. In shared memory: a
// run-time index would put them on the stack.
struct PendingMerges {
    WorkItem item[2];
    int count;
};

// Called by all consumers after they wrote their part of `w`.
__device__ __forceinline__ void announce_part(const DecodeParams& p, const WorkItem& w, PendingMerges& pending) {
    const bool later = w.parts > kAbsorbedParts;
    __threadfence();
    if (later && threadIdx.x == 0) pending.item[pending.count++] = w;
    named_barrier_sync(kBarrierConsumers, kConsumers);
    if (threadIdx.x == 0) atomic_add_acq_rel(&p.arrivals[2 * w.first_cta], 1);
}

constexpr int kMaxParts = 160;  // SMs of the largest Hopper GPU, and a few

template <int kRows>
struct MergeMemory {
    float4 sums[kConsumers];
    float weights[kRows + 2 * kMaxParts];  // (part, row of the slice)
};

// Merges this CTA's slice, 1/n-th of the rows' vectors, of one split item of n parts.
template <int kRows>
__device__ __forceinline__ void merge_slice(const DecodeParams& p, const WorkItem& w, MergeMemory<kRows>& smem) {
    u32* arrived = &p.arrivals[2 * w.first_cta];
    if (threadIdx.x == 0) spin_until(arrived, w.parts);
    named_barrier_sync(kBarrierConsumers, kConsumers);

    const int rows = min(kRows, p.s_q * p.h_q - w.row_block * kRows), part = part_of_this_cta(p, w);
    const int begin = rows * kVectors * part / w.parts, end = rows * kVectors * (part + 1) / w.parts;
    const int first_row = begin / kVectors, slice_rows = (end + kVectors - 1) / kVectors - first_row;
    const int thread = launder(threadIdx.x), warp = thread / 32, lane = thread % 32;

    for (int r = warp; r < slice_rows; r += kConsumers / 32) {  // a warp a row, a lane a part
        float2 stats[kMaxParts / 32];
        float m = -kInfinity, l = 0.f;
#pragma unroll
        for (int k = 0; k < kMaxParts / 32; ++k) {
            const int i = k * 32 + lane;
            stats[k] = i < w.parts ? partial_slot<kRows>(p, w.first_cta, i).stats[first_row + r] : make_float2(-kInfinity, 0.f);
            m = fmaxf(m, stats[k].x);
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
        if (m == -kInfinity) m = 0.f;
#pragma unroll
        for (int k = 0; k < kMaxParts / 32; ++k) l += stats[k].y * exp2f(stats[k].x - m);
#pragma unroll
        for (int step = 1; step < 32; step *= 2) l += __shfl_xor_sync(0xffffffffu, l, step);
#pragma unroll
        for (int k = 0; k < kMaxParts / 32; ++k)
            if (k * 32 + lane < w.parts)
                smem.weights[(k * 32 + lane) * slice_rows + r] = exp2f(stats[k].x - m) * inverse_sum(l);
        if (lane == 0 && (first_row + r) * kVectors >= begin)
            store_lse(p, w.request, w.row_block * kRows + first_row + r, natural_lse(m, l));
    }
    named_barrier_sync(kBarrierConsumers, kConsumers);

    // A slice of fewer vectors than threads: `teams` threads share a vector's parts, then the first adds their sums.
    const int vectors = end - begin, teams = vectors < kConsumers ? kConsumers / max(vectors, 1) : 1;
    for (int base = 0; base < vectors; base += kConsumers) {
        const int v = teams > 1 ? thread % vectors : base + thread, team = teams > 1 ? thread / vectors : 0;
        const bool works = v < vectors && team < teams;
        const int row = (begin + v) / kVectors, column = (begin + v) % kVectors;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        if (works) {
#pragma unroll 8
            for (int k = team; k < w.parts; k += teams) {
                const float weight = smem.weights[k * slice_rows + row - first_row];
                const float4 o = partial_slot<kRows>(p, w.first_cta, k).o[row][column];
                sum.x = fmaf(weight, o.x, sum.x);
                sum.y = fmaf(weight, o.y, sum.y);
                sum.z = fmaf(weight, o.z, sum.z);
                sum.w = fmaf(weight, o.w, sum.w);
            }
        }
        if (teams > 1) {
            smem.sums[thread] = sum;
            named_barrier_sync(kBarrierConsumers, kConsumers);
            for (int other = 1; works && team == 0 && other < teams; ++other) {
                const float4 more = smem.sums[other * vectors + v];
                sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
            }
        }
        if (works && team == 0) {
            u16* out = out_row(p, w.request, w.row_block * kRows + row);
            reinterpret_cast<uint2*>(out)[column] = make_uint2(pack_elements(sum.x, sum.y), pack_elements(sum.z, sum.w));
        }
    }
    named_barrier_sync(kBarrierConsumers, kConsumers);
    if (threadIdx.x == 0) {  // the last to leave resets the counters for the next launch
        if (atomic_add_acq_rel(arrived + 1, 1) == static_cast<u32>(w.parts - 1)) arrived[0] = arrived[1] = 0;
    }
}
