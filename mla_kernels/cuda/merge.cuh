// Results, and items that are split between CTAs: parts in global memory, merged in the same launch.
//
// A part is O (unnormalised) and, per row, its RowStats. Part 0 is the last item of its CTA's share, every other part the
// first of its own. So with few parts the others are long done when part 0 is: its CTA streams them through its ring like
// tiles and writes the result. With many parts (few, long sequences) every CTA leaves its part, and when its share is done merges
// 1/n-th of the rows. Always in the same order: results do not depend on timing. The launch is cooperative: every CTA
// waited for is resident.
#pragma once
#include "producer.cuh"
#include "softmax.cuh"

constexpr float kLn2 = 0.693147180559945309f;

// What is known of a row's scores: the reference m (log2 units), the sum l = sum 2^(s - m) for the LSE, and the same sum n
// of the rounded probabilities that were multiplied with V: dividing by n takes their rounding out of a sharp softmax.
struct RowStats {
    float m, l, n;
};

// A part lies as the accumulators do, so that every access is 16 bytes a thread and coalesced. A kernel's `Fragment`
// says what a thread's vector j of four accumulators is: its elements' rows, and where they go in the result.
template <int kRows>
constexpr int kVectors = kRows * kHeadDimV / (4 * kValueThreads);  // a thread

template <int kRows>
struct PartialSlot {
    float4 o[2][kVectors<kRows>][kWarpgroup];  // by value warpgroup
    RowStats stats[kRows];
    float pad[kRows];
};

template <int kRows>
__device__ __forceinline__ PartialSlot<kRows>& partial_slot(const DecodeParams& p, int first_cta, int part) {
    auto* slots = reinterpret_cast<PartialSlot<kRows>*>(p.partials);
    return slots[2 * (first_cta + part * p.group) + (part == 0)];
}

// 1 / n, 0 for a row that sees no token, NaN for a row that must be NaN.
__device__ __forceinline__ float inverse_sum(float n) { return n > 0.f ? 1.f / n : n; }

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
    const u32 thread = launder(threadIdx.x);
    auto* out = reinterpret_cast<uint2*>(out_row(p, w.request, w.row_block * kRows));
    for (int i = thread; i < rows * kHeadDimV / 4; i += kValueThreads) out[i] = make_uint2(packed, packed);
    for (int r = thread; r < rows; r += kValueThreads)
        store_lse(p, w.request, w.row_block * kRows + r, w.invalid ? kNan : -kInfinity);
}

constexpr int kAbsorbedParts = 3;

// Whether parts of it are to be merged. (Of a block without loads or arithmetic they have no meaning.)
__device__ __forceinline__ bool is_split(const WorkItem& w) { return kLoads && kMath && w.parts > 1; }

// Whether this CTA finishes a split item of few parts.
__device__ __forceinline__ bool absorbs(const WorkItem& w) {
    return is_split(w) && w.parts <= kAbsorbedParts && w.part == 0;
}

// A part to be absorbed comes through the ring, in pieces that follow the item's tiles: a value warpgroup's half of it (rows
// of 64: a quarter) in the place of its group of boxes, and with its first piece the stats in that of the rotary box.
template <int kRows>
struct PartPieces {
    static constexpr int kBytes = kVectors<kRows> * kWarpgroup * 16;  // of a part, for one value warpgroup
    static constexpr int kCount = kBytes > kGroupBoxes * kBoxBytes ? kBytes / (kGroupBoxes * kBoxBytes) : 1;
    static constexpr int kPieceBoxes = kBytes / kCount / kBoxBytes;
    static constexpr int kPieceVectors = kVectors<kRows> / kCount;
    static_assert(kPieceBoxes * kBoxBytes * kCount == kBytes, "whole boxes");

    __device__ static u32 ordinal(const WorkItem& w, int piece, int part) {
        return w.ordinal + (w.end - w.begin) + (part - 1) * kCount + piece;
    }
};

__device__ __forceinline__ void spin_until(const u32* counter, int count) {
    while (load_acquire(counter) < static_cast<u32>(count)) {
    }
}

// Loader, one thread: waits for the other parts of `w` and streams them.
template <int kRows>
__device__ __forceinline__ void load_parts(const DecodeParams& p, TileRing& ring, const WorkItem& w) {
    using Pieces = PartPieces<kRows>;
    u32* arrived = &p.arrivals[2 * w.first_cta];
    spin_until(arrived, w.parts - 1);
    *arrived = 0;  // as the next launch expects it
    fence_proxy_async_global();  // what others wrote by ordinary stores is read by copies
#pragma unroll 1
    for (int k = 1; k < w.parts; ++k) {
        const auto& part = partial_slot<kRows>(p, w.first_cta, k);
        ring.load_rotary(Pieces::ordinal(w, 0, k), part.stats, sizeof(part.stats));
    }
#pragma unroll 1
    for (int i = 0; i < (w.parts - 1) * Pieces::kCount * kGroups; ++i) {
        const int k = 1 + i / (Pieces::kCount * kGroups), piece = i / kGroups % Pieces::kCount, g = i % kGroups;
        const auto& half = partial_slot<kRows>(p, w.first_cta, k).o[g];
        ring.load_group(Pieces::ordinal(w, piece, k), g, half[piece * Pieces::kPieceVectors], Pieces::kPieceBoxes);
    }
}

__device__ __forceinline__ float4 scaled(float4 v, float x, float y, float z, float w) {
    return make_float4(v.x * x, v.y * y, v.z * z, v.w * w);
}

// v + a * weights
__device__ __forceinline__ float4 weighted(float4 v, float4 a, float x, float y, float z, float w) {
    return make_float4(fmaf(a.x, x, v.x), fmaf(a.y, y, v.y), fmaf(a.z, z, v.z), fmaf(a.w, w, v.w));
}

template <int kRows>
__device__ __forceinline__ int valid_rows(const DecodeParams& p, const WorkItem& w) {
    return min(kRows, p.s_q * p.h_q - w.row_block * kRows);
}

// What the parts of a row weigh in the result, part 0 first.
struct PartWeights {
    float of[kAbsorbedParts];
};

// Score warpgroup, one thread a row: weighs part 0 (`own`) of an item and those that the loader brings; writes the LSE.
template <int kRows>
__device__ __forceinline__ PartWeights weigh_parts(const DecodeParams& p, const WorkItem& w, int row, const RowStats& own, TileRing& ring) {
    RowStats stats[kAbsorbedParts];
    float m = own.m, l = 0.f, n = 0.f;
#pragma unroll
    for (int k = 0; k < kAbsorbedParts; ++k) {
        stats[k] = k == 0 ? own : RowStats{-kInfinity, 0.f, 0.f};
        if (k > 0 && k < w.parts) {
            const u32 ordinal = PartPieces<kRows>::ordinal(w, 0, k);
            ring.wait_box(ordinal, kRotaryBox);
            stats[k] = reinterpret_cast<const RowStats*>(ring.box(ordinal, kRotaryBox))[row];
        }
        m = fmaxf(m, stats[k].m);
    }
    PartWeights weights;
#pragma unroll
    for (int k = 0; k < kAbsorbedParts; ++k) {
        weights.of[k] = rescale_factor(stats[k].m, m);
        l += stats[k].l * weights.of[k];
        n += stats[k].n * weights.of[k];
    }
#pragma unroll
    for (int k = 0; k < kAbsorbedParts; ++k) weights.of[k] *= inverse_sum(n);
    if (row < valid_rows<kRows>(p, w)) store_lse(p, w.request, w.row_block * kRows + row, natural_lse(m, l));
    return weights;
}

// Score warpgroup, one thread a row, at an item's end: where the row's stats go. `n` and `weights` are the value warpgroups'.
template <int kRows>
__device__ __forceinline__ void write_stats(const DecodeParams& p, const WorkItem& w, int row, const RowStats& stats, TileRing& ring,
                                            float* n, PartWeights* weights) {
    n[row] = stats.n;
    if (absorbs(w)) weights[row] = weigh_parts<kRows>(p, w, row, stats, ring);
    else if (is_split(w)) partial_slot<kRows>(p, w.first_cta, w.part).stats[row] = stats;
    else if (row < valid_rows<kRows>(p, w)) store_lse(p, w.request, w.row_block * kRows + row, natural_lse(stats.m, stats.l));
}

// Leaves this CTA's part of `w` for whoever merges it.
template <int kRows, class Values>
__device__ __forceinline__ void write_part(const DecodeParams& p, const WorkItem& w, Values& values) {
    const u32 thread = launder(threadIdx.x);
    auto& o = partial_slot<kRows>(p, w.first_cta, w.part).o[thread / kWarpgroup];
#pragma unroll
    for (int j = 0; j < kVectors<kRows>; ++j) o[j][thread % kWarpgroup] = values.vector(j);
}

// Makes the normalised result of part 0, which this CTA holds, and the others that the loader brings.
template <int kRows, class Values>
__device__ __forceinline__ void absorb_parts(const WorkItem& w, Values& values, const PartWeights* weights, TileRing& ring) {
    using Fragment = typename Values::Fragment;
    using Pieces = PartPieces<kRows>;
    const u32 thread = launder(threadIdx.x), g = thread / kWarpgroup;
#pragma unroll 1
    for (int k = 1; k < w.parts; ++k) {
        float own[Fragment::kThreadRows], other[Fragment::kThreadRows];
#pragma unroll
        for (int i = 0; i < Fragment::kThreadRows; ++i) {
            const PartWeights& row = weights[Fragment::row(thread, i)];
            own[i] = k == 1 ? row.of[0] : 1.f, other[i] = row.of[k];
        }
#pragma unroll
        for (int piece = 0; piece < Pieces::kCount; ++piece) {
            const u32 ordinal = uniform(Pieces::ordinal(w, piece, k));
#pragma unroll 1
            for (int c = 0; c < Pieces::kPieceBoxes; ++c) ring.wait_box(ordinal, g * kGroupBoxes + c);
            const auto* part = reinterpret_cast<const float4*>(ring.box(ordinal, g * kGroupBoxes)) + thread % kWarpgroup;
#pragma unroll
            for (int i = 0; i < Pieces::kPieceVectors; ++i) {
                const int j = piece * Pieces::kPieceVectors + i;
                const float4 mine = scaled(values.vector(j), own[Fragment::slot(j, 0)], own[Fragment::slot(j, 1)],
                                           own[Fragment::slot(j, 2)], own[Fragment::slot(j, 3)]);
                values.set_vector(j, weighted(mine, load_shared(part + i * kWarpgroup), other[Fragment::slot(j, 0)], other[Fragment::slot(j, 1)],
                                              other[Fragment::slot(j, 2)], other[Fragment::slot(j, 3)]));
            }
            ring.release_group(ordinal, g);
        }
    }
}

// The result of an item. `weight`: what O is multiplied with.
template <int kRows, class Values>
__device__ __forceinline__ void write_out(const DecodeParams& p, const WorkItem& w, Values& values, const float (&weight)[Values::Fragment::kThreadRows]) {
    using Fragment = typename Values::Fragment;
    const u32 thread = launder(threadIdx.x);
    u16* out = out_row(p, w.request, w.row_block * kRows);
    const int rows = valid_rows<kRows>(p, w);
#pragma unroll
    for (int j = 0; j < kVectors<kRows>; j += Fragment::kStoreVectors)
        Fragment::store(out, rows, thread, j, [&](int i, int half) {
            const float4 v = values.vector(j + i);
            const float first = weight[Fragment::slot(j + i, 2 * half)], second = weight[Fragment::slot(j + i, 2 * half + 1)];
            return half == 0 ? pack_elements(v.x * first, v.y * second) : pack_elements(v.z * first, v.w * second);
        });
}

// Run by one warp: tells the other CTAs of the parts that this one leaves, so that nobody waits for the writes to land.
__device__ __forceinline__ void announce_parts(const DecodeParams& p, ItemQueue& queue, u64* part_written) {
    u32 phase = 0;
    for (u32 index = 0;; ++index) {
        const WorkItem& w = queue.wait(index);
        if (w.request < 0) break;
        if (is_split(w) && !absorbs(w)) {
            mbarrier_wait(part_written, phase);
            phase ^= 1;
            if ((threadIdx.x & 31) == 0) atomic_add_acq_rel(&p.arrivals[2 * w.first_cta], 1);
        }
        queue.release(index);
    }
}

constexpr int kMaxParts = 160;  // SMs of the largest Hopper GPU, and a few

// Whether this CTA merges a slice of the item.
__device__ __forceinline__ bool merges(const WorkItem& w) { return is_split(w) && w.parts > kAbsorbedParts && w.part < w.parts - 1; }

template <int kRows>
struct MergeMemory {
    float4 sums[kScoreThreads];
    RowStats stats[kMaxParts][kRows];  // of the slice's rows; then m is what the part weighs
};

// Score warpgroup: merges this CTA's slice of an item. A unit is what one value warp holds of one vector; a slice is its
// share of the units, in an order in which warps of the same rows are neighbours. All is latency here: every load that can
// be is under way at once, and the code is short (it is not in the instruction cache) and there once.
template <int kRows, class Fragment>
__device__ __forceinline__ void merge_slice(const DecodeParams& p, const WorkItem& w, MergeMemory<kRows>& smem) {
    constexpr int kOwners = kValueThreads / 32, kUnits = kVectors<kRows> * kOwners, kWarps = kScoreThreads / 32, kInFlight = 16;
    u32* arrived = &p.arrivals[2 * w.first_cta];
    const int thread = threadIdx.x % kScoreThreads, warp = thread / 32, lane = thread % 32;
    const int parts = w.parts, slices = parts - 1;
    const int begin = kUnits * w.part / slices, units = kUnits * (w.part + 1) / slices - begin;
    const auto place = [](int unit) { return unit / kVectors<kRows>; };  // of a unit's warp in that order
    const int first_row = place(begin) / 2 * Fragment::kWarpStride;
    const int end_row = place(begin + max(units, 1) - 1) / 2 * Fragment::kWarpStride + Fragment::kWarpRows;
    if (thread == 0) spin_until(arrived, parts);
    named_barrier_sync(kBarrierScore, kScoreThreads);

    const int slice_rows = end_row - first_row;
#pragma unroll 4
    for (int i = thread; i < parts * slice_rows; i += kScoreThreads)
        smem.stats[i / slice_rows][first_row + i % slice_rows] = partial_slot<kRows>(p, w.first_cta, i / slice_rows).stats[first_row + i % slice_rows];
    named_barrier_sync(kBarrierScore, kScoreThreads);

    constexpr int kLanes = 8;  // that share a row
    for (int row = first_row + thread / kLanes; row < end_row; row += kScoreThreads / kLanes) {
        float m = -kInfinity, l = 0.f, n = 0.f;
        for (int k = thread % kLanes; k < parts; k += kLanes) m = fmaxf(m, smem.stats[k][row].m);
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, step));
        for (int k = thread % kLanes; k < parts; k += kLanes) {
            RowStats& stats = smem.stats[k][row];
            const float weight = rescale_factor(stats.m, m);
            l += stats.l * weight;
            n += stats.n * weight;
            stats.m = weight;
        }
#pragma unroll
        for (int step = 1; step < kLanes; step *= 2) {
            l += __shfl_xor_sync(0xffffffffu, l, step);
            n += __shfl_xor_sync(0xffffffffu, n, step);
        }
        const float inverse = inverse_sum(n);
        for (int k = thread % kLanes; k < parts; k += kLanes) smem.stats[k][row].m *= inverse;
        // the slice that holds the first unit of these rows writes their LSE
        const int first_unit = row / Fragment::kWarpRows * 2 * kVectors<kRows>;
        if (thread % kLanes == 0 && row < valid_rows<kRows>(p, w) && first_unit >= begin && first_unit < begin + units)
            store_lse(p, w.request, w.row_block * kRows + row, natural_lse(m, l));
    }
    named_barrier_sync(kBarrierScore, kScoreThreads);

    // With fewer units than warps, `teams` warps share a unit's parts, and the first adds their sums.
    const int teams = units > 0 ? max(kWarps / units, 1) : 1, team = units < kWarps ? warp / max(units, 1) : 0;
    for (int base = 0; base < units; base += kWarps) {
        const int unit = units < kWarps ? warp % units : base + warp, j = (begin + unit) % kVectors<kRows>;
        const int order = place(begin + unit), owner = (order % 2 * 4 + order / 2) * 32 + lane;
        const bool works = unit < units && team < teams;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        if (works) {
            const float* weights[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) weights[i] = &smem.stats[0][Fragment::row(owner, Fragment::slot(j, i))].m;
            constexpr int kStride = sizeof(smem.stats[0]) / sizeof(float);
#pragma unroll 1
            for (int first = team; first < parts; first += kInFlight * teams) {
                float4 o[kInFlight];
#pragma unroll
                for (int i = 0; i < kInFlight; ++i) {
                    const int k = first + i * teams;
                    o[i] = k < parts ? partial_slot<kRows>(p, w.first_cta, k).o[owner / kWarpgroup][j][owner % kWarpgroup]
                                     : make_float4(0.f, 0.f, 0.f, 0.f);
                }
#pragma unroll
                for (int i = 0; i < kInFlight; ++i) {
                    const int k = min(first + i * teams, parts - 1) * kStride;
                    sum = weighted(sum, o[i], weights[0][k], weights[1][k], weights[2][k], weights[3][k]);
                }
            }
        }
        if (teams > 1) {
            smem.sums[thread] = sum;
            named_barrier_sync(kBarrierScore, kScoreThreads);
            for (int other = 1; works && team == 0 && other < teams; ++other)
                sum = weighted(sum, smem.sums[thread + other * units * 32], 1.f, 1.f, 1.f, 1.f);
        }
        if (works && team == 0)
            Fragment::store_one(out_row(p, w.request, w.row_block * kRows), valid_rows<kRows>(p, w), owner, j, sum);
    }
    if (thread == 0)  // the last to leave resets the counters for the next launch
        if (atomic_add_relaxed(arrived + 1, 1) == static_cast<u32>(slices - 1)) arrived[0] = arrived[1] = 0;
}
