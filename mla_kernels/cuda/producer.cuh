// The producer warp: walks the CTA's work items and streams their KV boxes into a ring, as far ahead of the consumers
// as the ring is deep, across item borders.
#pragma once
#include "schedule.cuh"

// What a cubin does: all of it, or one of the building blocks that the study measures alone.
enum class Work {
    kDecode,    // everything
    kStream,    // the loads, no arithmetic
    kMma,       // the WGMMA sequence on whatever lies in shared memory, no loads
    kSkeleton,  // loads and WGMMA, without softmax and the exchange of P
};
constexpr Work kWork = static_cast<Work>(MLA_WORK);
constexpr bool kLoads = kWork != Work::kMma;
constexpr bool kMath = kWork != Work::kStream;
constexpr bool kSoftmax = kWork == Work::kDecode;

// Two rings, one for the tiles of even ordinal in a CTA's share, one for the odd: whoever takes a ring's tiles takes all
// of them in order. (With one ring shared by two warpgroups, one could wait for a slot's next use before its last use
// had landed, and the parity of an mbarrier does not tell these apart.)
template <int kSlots>
struct alignas(1024) BoxRing {
    u16 box[kSlots][kBoxElements];
    u64 full[kSlots];   // the box has landed
    u64 empty[kSlots];  // four warps have read it for the last time

    __device__ void init_barriers() {
        static_assert(sizeof(BoxRing) % 1024 == 0, "the second ring must start on a swizzle atom too");
        for (int i = 0; i < kSlots; ++i) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], 4);
        }
    }
};

// Slot of a ring and the parity of its use.
struct RingPlace {
    int slot;
    u32 phase;
};

// Place of box c of the tile of this ordinal in its ring.
template <int kSlots>
__device__ __forceinline__ RingPlace ring_place(u32 ordinal, int c) {
    const u32 box = (ordinal >> 1) * kBoxes + c;
    return {static_cast<int>(box % kSlots), box / kSlots & 1};
}

// Work items on their way from the producer to the consumers and the warp that loads their queries. `request` < 0 ends
// the share.
struct ItemQueue {
    static constexpr int kSlots = 4;
    WorkItem item[kSlots];
    u64 full[kSlots], empty[kSlots];

    __device__ void init_barriers() {
        for (int i = 0; i < kSlots; ++i) {
            mbarrier_init(&full[i], 1);
            mbarrier_init(&empty[i], kConsumers / 32 + 1);
        }
    }
    __device__ WorkItem& push(const WorkItem& w) {  // by one thread
        const u32 slot = w.index % kSlots;
        mbarrier_wait(&empty[slot], (w.index / kSlots & 1) ^ 1);
        item[slot] = w;
        mbarrier_arrive(&full[slot]);
        return item[slot];
    }
    __device__ WorkItem& wait(u32 index) {
        mbarrier_wait(&full[index % kSlots], index / kSlots & 1);
        return item[index % kSlots];
    }
    __device__ u32 release(const WorkItem& w) {  // by every warp that waits; returns the next item's index
        const u32 next = w.index + 1;
        __syncwarp();  // no lane reads `w` any more
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(&empty[(next - 1) % kSlots]);
        return next;
    }
};

// Run by one warp: walks the CTA's share, hands its items to the consumers and streams their boxes.
// A page id outside the pool is never read: TMA fills the box with zeros, and `invalid` makes NaN of the result.
template <int kSlots>
__device__ __forceinline__ void produce(const DecodeParams& p, BoxRing<kSlots> (&rings)[2], ItemQueue& queue) {
    const int lane = threadIdx.x & 31;
    WorkRange range(p);
    WorkItem w;
    WorkItem* pushed = nullptr;
    while (range.next(w)) {
        if (lane == 0) pushed = &queue.push(w);
        if (!kLoads) continue;
        const int* pages = p.block_table + static_cast<long long>(w.request) * p.table_stride;
        int lane_page = 0;
        for (int tile = w.begin; tile < w.end; ++tile) {
            const int ahead = (tile - w.begin) & 31;
            if (ahead == 0 && tile + lane < w.end) lane_page = pages[tile + lane];
            const int page = __shfl_sync(0xffffffffu, lane_page, ahead);
            if (lane == 0) {
                if (page < 0 || page >= p.num_pages) pushed->invalid = true;  // seen with the boxes' barriers
                const u32 ordinal = w.tiles_before + tile - w.begin;
                BoxRing<kSlots>& ring = rings[ordinal & 1];
#pragma unroll 1
                for (int c = 0; c < kBoxes; ++c) {
                    const auto [slot, phase] = ring_place<kSlots>(ordinal, c);
                    mbarrier_wait(&ring.empty[slot], phase ^ 1);
                    mbarrier_arrive_expect_tx(&ring.full[slot], kBoxBytes);
                    tma_load_3d(ring.box[slot], &p.kv_map, &ring.full[slot], c * kBoxColumns, 0, page);
                }
            }
            __syncwarp();
        }
    }
    range.end_mark(w);
    if (lane == 0) queue.push(w);
}
