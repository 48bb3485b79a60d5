// The warps that stream items' tiles into the ring.
//
// A page id outside the pool is never read: TMA fills the box with zeros, as the gathering warps do, and `invalid` makes NaN of
// the result.
#pragma once
#include "producer.cuh"

// Run by one warp, a page being a tile or several: streams the items' tiles.
__device__ __forceinline__ void load_items(const DecodeParams& p, TileRing& ring, ItemQueue& queue) {
    // Two tiles at a time, each in one go, though the ring has room for more: the HBM gives halves of tiles, some time apart, 1 to
    // 1.5 % slower. (Not where CTAs side by side read the same tiles. They are 1.5 to 2 % slower so: what is more in the ring hides
    // that one is ahead of the other. 04's log, 2026-11-27.)
    const bool whole_tiles = MLA_ROWS < kTileTokens && kGroupSlots > 2 * kGroups && gridDim.x == 1;
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
                if (place == 0 && tile + lane < end) lane_page = pages[(tile + lane) / kPageTiles];
                const int page = __shfl_sync(0xffffffffu, lane_page, place);
                if (lane == 0) {
                    if (page < 0 || page >= p.num_pages) w.invalid = true;  // seen with the boxes' barriers
                    if (whole_tiles && ordinal >= 2) ring.wait_read(ordinal - 2);
                    ring.load(ordinal, &p.kv_map, tile % kPageTiles * kTileTokens, page);
                }
                __syncwarp();
            }
        }
        queue.release(index);
    }
}

// Where the tokens of an item are that this CTA reads. A page or a piece of one at a time, `1 << shift` tokens.
class ItemPages {
   public:
    __device__ ItemPages(const DecodeParams& p, const WorkItem& w, int shift)
        : p_(p), pages_(p.block_table + static_cast<long long>(w.request) * p.table_stride), shift_(shift),
          end_(min(w.end * kTileTokens, w.kv_len)) {}

    // By a whole warp: the page of the piece that is `lane` pieces after token `token`, -1 past the end and, which sets
    // `invalid`, outside the pool.
    __device__ int read(int token, bool& invalid) const {
        const int lane = threadIdx.x & 31, own = token + (lane << shift_);
        int page = own < end_ ? pages_[own >> p_.page_shift] : -1;
        const bool bad = own < end_ && static_cast<u32>(page) >= static_cast<u32>(p_.num_pages);
        if (bad) page = -1;
        if (__ballot_sync(0xffffffffu, bad) != 0 && lane == 0) invalid = true;  // seen with the boxes' barriers
        return page;
    }

   private:
    const DecodeParams& p_;
    const int* pages_;
    int shift_, end_;
};

__device__ __forceinline__ const TensorMap* rotary_map(const DecodeParams& p) {
#if MLA_PAGE_SIZE == 0
    return &p.rotary_map;
#else
    return nullptr;  // not called
#endif
}

// Run by `kLoaders` warps, pages being of 8 tokens or more: a tile comes in pieces of pages, or is a part of one.
__device__ __forceinline__ void load_items_in_pieces(const DecodeParams& p, TileRing& ring, ItemQueue& queue, int warp) {
    const int in_page = (1 << p.page_shift) - 1;
    const int shift = min(p.page_shift, 6), rows = 1 << shift;
    for (u32 index = 0;; ++index) {
        WorkItem& w = queue.wait(index);
        if (w.request < 0) break;
        if (kLoads && w.tiles > 0) {
            if (MLA_ROWS == kTileTokens)
                ring.load_queries(w.ordinal - 1, warp, &p.q_map, query_row(p, w, w.row_block * kTileTokens), query_plane(w));
            const ItemPages pages(p, w, shift);
            u32 ordinal = w.ordinal;
            int lane_page = 0, place = 0;  // of the tile's first piece among the 32 that the warp knows
            for (int token = w.begin * kTileTokens, end = w.end * kTileTokens; token < end; token += kTileTokens, ++ordinal) {
                if (place == 0) lane_page = pages.read(token, w.invalid);
                ring.load_pieces(ordinal, warp, &p.kv_map, rotary_map(p), rows, [&](int first, int& y, int& z) {
                    y = (token + first) & in_page;
                    z = __shfl_sync(0xffffffffu, lane_page, place + (first >> shift));
                });
                place = (place + (kTileTokens >> shift)) & 31;
            }
        }
        queue.release(index);
    }
}

// Run by `kGatherThreads` threads, pages being of fewer tokens: each copies its rows. `warp`: of theirs.
__device__ __forceinline__ void gather_items(const DecodeParams& p, TileRing& ring, ItemQueue& queue, int warp) {
    const auto& pool = reinterpret_cast<const TokenPool&>(p.kv_map);
    const int in_page = (1 << p.page_shift) - 1;
    for (u32 index = 0;; ++index) {
        WorkItem& w = queue.wait(index);
        if (w.request < 0) break;
        if (kLoads && w.tiles > 0) {
            if (MLA_ROWS == kTileTokens) {
                const int first = w.row_block * kTileTokens, end = query_tokens(p, w) * p.h_q;
                const u16* q = pool.q + first_query(p, w) * p.h_q * kHeadDim;
                ring.gather(w.ordinal - 1, warp, [&](int row) { return first + row < end ? q + (first + row) * kHeadDim : nullptr; });
            }
            const ItemPages pages(p, w, 0);
            u32 ordinal = w.ordinal;
            int token = w.begin * kTileTokens;
            int low = pages.read(token, w.invalid), high = pages.read(token + 32, w.invalid);  // of the lanes' tokens
            for (const int end = w.end * kTileTokens; token < end; token += kTileTokens, ++ordinal) {
                const int next_low = pages.read(token + kTileTokens, w.invalid);
                const int next_high = pages.read(token + kTileTokens + 32, w.invalid);
                ring.gather(ordinal, warp, [&](int row) -> const u16* {
                    const int page = __shfl_sync(0xffffffffu, row < 32 ? low : high, row & 31);
                    if (page < 0) return nullptr;
                    return pool.kv + page * pool.page_stride + ((token + row) & in_page) * pool.token_stride;
                });
                low = next_low, high = next_high;
            }
        }
        queue.release(index);
    }
}
