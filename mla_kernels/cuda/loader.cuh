// The warp that streams items' tiles into the ring.
#pragma once
#include "producer.cuh"

// Run by one warp: streams the items' tiles.
// A page id outside the pool is never read: TMA fills the box with zeros, and `invalid` makes NaN of the result.
__device__ __forceinline__ void load_items(const DecodeParams& p, TileRing& ring, ItemQueue& queue) {
    const int lane = threadIdx.x & 31;
    for (u32 index = 0;; ++index) {
        WorkItem& w = queue.wait(index);
        if (w.request < 0) break;
        if (kLoads && w.tiles > 0) {
            const int* pages = p.block_table + static_cast<long long>(w.request) * p.table_stride;
            if (MLA_ROWS == kTileTokens && lane == 0) ring.load(w.ordinal - 1, &p.q_map, w.row_block * kTileTokens, w.request);
            u32 ordinal = w.ordinal;
            const int begin = w.begin, end = w.end;
            int lane_page = 0;
            for (int tile = begin; tile < end; ++tile, ++ordinal) {
                const int place = (tile - begin) & 31;
                if (place == 0 && tile + lane < end) lane_page = pages[tile + lane];
                const int page = __shfl_sync(0xffffffffu, lane_page, place);
                if (lane == 0) {
                    if (page < 0 || page >= p.num_pages) w.invalid = true;  // seen with the boxes' barriers
                    ring.load(ordinal, &p.kv_map, 0, page);
                }
                __syncwarp();
            }
        }
        queue.release(index);
    }
}
