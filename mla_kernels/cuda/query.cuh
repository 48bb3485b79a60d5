// An item's query rows in shared memory, loaded while the item before is still being finished (decode_swapped.cu).
#pragma once
#include "producer.cuh"

template <int kRows>
struct QueryBuffer {
    u16 box[kBoxes][kRows * kBoxColumns];  // 128-byte swizzle
    u64 full;                              // the rows have landed
    u64 empty;                             // every score warp has multiplied them for the last time

    __device__ void init_barriers() {
        mbarrier_init(&full, 1);
        mbarrier_init(&empty, kScoreThreads / 32);
    }
};

// Run by one warp: follows the items. Rows past the sequence's last come as zeros.
template <int kRows>
__device__ __forceinline__ void fetch_queries(const DecodeParams& p, QueryBuffer<kRows>& q, ItemQueue& queue) {
    u32 loaded = 0;
    for (u32 index = 0;; ++index) {
        const WorkItem& w = queue.wait(index);
        if (w.request < 0) break;
        if (w.tiles > 0) {
            if ((threadIdx.x & 31) == 0) {
                mbarrier_wait(&q.empty, (loaded & 1) ^ 1);
                mbarrier_arrive_expect_tx(&q.full, sizeof(q.box));
#pragma unroll 1
                for (int c = 0; c < kBoxes; ++c)
                    tma_load_3d(q.box[c], &p.q_map, &q.full, c * kBoxColumns, query_row(p, w, w.row_block * kRows), query_plane(w));
            }
            ++loaded;
        }
        queue.release(index);
    }
}
