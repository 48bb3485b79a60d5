// Items that are split between CTAs: their parts lie in global memory, and are put together in the same launch.
//
// Part 0 is the last item of its CTA's share, every other part the first of its own. So with few parts the others are long
// done when part 0 is: its CTA absorbs them, streaming them through its ring like tiles. With many parts (few, long
// sequences) every CTA leaves its part, and all but the last one's merge a slice (merge.cuh). Always in the same order:
// results do not depend on timing. The launch is cooperative: every CTA waited for is resident.
#pragma once
#include "producer.cuh"
#include "result.cuh"

// A part: O, unnormalised, as the accumulators lie, so that every access is 16 bytes a thread and coalesced, and its rows'
// stats.
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
