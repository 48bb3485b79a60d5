// Who does what: every CTA finds its share of the batch from the lengths on the device, with no plan step.
//
// The batch is a line of work units. Each (request, row group) is an item: `kItemUnits` units for its fixed cost, then
// one unit a 64-token tile. A row group is `group` row blocks that sit side by side in `group` CTAs and walk the same
// tiles at the same time, so that the second reads KV from L2. The line is cut into equal shares; an item cut by a
// share's end is split, and its parts are merged by the CTAs that hold them (parts.cuh). One warp walks the share.
#pragma once
#include "layout.cuh"

struct alignas(64) DecodeParams {
    TensorMap kv_map;          // (576 columns, page_size tokens, num_pages), boxes of 64 x 64
    TensorMap q_map;           // (576 columns, s_q * h_q rows, b), boxes of 64 x a CTA's rows
    u16* out;                  // (b, s_q, h_q, 512)
    float* lse;                // (b, h_q, s_q), natural log
    const int* block_table;    // (b, max_pages)
    const int* cache_seqlens;  // (b,)
    float* partials;           // two slots a CTA (parts.cuh)
    u32* arrivals;             // two counters a CTA, zero between launches
    float softmax_scale_log2;  // softmax_scale * log2(e)
    int b, s_q, h_q, num_pages, max_pages, table_stride, row_blocks, group, row_groups, causal;
};

struct WorkItem {
    int request, kv_len, tiles;
    int row_block;         // of this CTA; may be past the last (then `active` is false)
    int begin, end;        // this CTA's tiles
    u32 ordinal;           // of its first tile among all that this CTA streams (the queries of decode_rows.cu count)
    int first_cta;         // the CTA that holds the item's first tile (same place in its group)
    int part, parts;       // which of the item's parts this is, of how many
    bool active;
    bool invalid;  // a length outside the table, or (set while its tiles stream in) a page outside the pool: NaN
};

class WorkRange {
   public:
    __device__ explicit WorkRange(const DecodeParams& p) : p_(p) {
        const int lane = threadIdx.x & 31;
        int total = 0;
#pragma unroll 4
        for (int i = lane; i < p.b; i += 32) total += units_of(tiles(i));
        total = __reduce_add_sync(0xffffffffu, total);
        const int groups = gridDim.x / p.group;
        share_ = (total + groups - 1) / groups;
        position_ = blockIdx.x / p.group * share_;
        end_ = min(position_ + share_, total);
        if (position_ >= end_) return;
        bool found = false;  // (short code here: at a launch it is in no cache, but the lengths are by now)
#pragma unroll 1
        for (int base = 0; !found && base < p.b; base += 32) found = find(base, base + lane < p.b ? tiles(base + lane) : -kItemUnits);
        row_group_ = (position_ - item_begin_) / (tiles_ + kItemUnits);  // skip those that end before the share
        item_begin_ += row_group_ * (tiles_ + kItemUnits);
    }

    // The next item of which this CTA has tiles, or which is empty and starts in this share; false and a negative request
    // after the last. Every lane writes the same to `w`, which may lie in shared memory: registers are few here.
    __device__ bool next(WorkItem& w) {
        while (position_ < end_) {
            const int first_tile = item_begin_ + kItemUnits;
            const int item_end = first_tile + tiles_;
            const int stop = min(end_, item_end);
            w.request = request_;
            w.kv_len = p_.cache_seqlens[request_];
            w.invalid = w.kv_len < 0 || w.kv_len > p_.max_pages * kPageTokens;
            w.tiles = tiles_;
            const int member = blockIdx.x % p_.group;
            w.row_block = row_group_ * p_.group + member;
            w.active = w.row_block < p_.row_blocks;
            w.begin = max(position_ - first_tile, 0);
            w.end = max(stop - first_tile, 0);
            w.ordinal = streamed_ + kQueryTiles;
            const int first_group = first_tile / share_;
            w.first_cta = first_group * p_.group + member;
            w.part = static_cast<int>(blockIdx.x) / p_.group - first_group;
            w.parts = tiles_ > 0 ? (item_end - 1) / share_ - first_group + 1 : 1;
            const bool owns = tiles_ > 0 ? w.begin < w.end : position_ == item_begin_;
            position_ = stop;
            if (position_ == item_end) {
                item_begin_ = item_end;
                if (++row_group_ == p_.row_groups) {
                    row_group_ = 0;
                    ++request_;
                    if (position_ < end_) tiles_ = tiles(request_);
                }
            }
            if (owns && w.active) {
                if (w.tiles > 0) streamed_ += kQueryTiles + w.end - w.begin;
                return true;
            }
        }
        w.request = -1;
        return false;
    }

   private:
    static constexpr int kItemUnits = MLA_ITEM_UNITS;
    static constexpr u32 kQueryTiles = MLA_ROWS == kTileTokens;  // an item's queries come as a tile of their own
    static_assert(kItemUnits > 0, "an empty request needs a unit to be found by");

    __device__ int tiles(int request) const {
        const int length = p_.cache_seqlens[request];
        return length < 0 || length > p_.max_pages * kPageTokens ? 0 : (length + kTileTokens - 1) / kTileTokens;
    }
    __device__ int units_of(int tiles) const { return p_.row_groups * (tiles + kItemUnits); }

    // Whether one of 32 requests from `base` on holds `position_`; the lanes give their tiles, and item_begin_ advances.
    __device__ bool find(int base, int lane_tiles) {
        const int lane = threadIdx.x & 31, own = units_of(lane_tiles);
        int inclusive = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, inclusive, step);
            if (lane >= step) inclusive += other;
        }
        const u32 past = __ballot_sync(0xffffffffu, item_begin_ + inclusive > position_);
        if (past == 0) {
            item_begin_ += __shfl_sync(0xffffffffu, inclusive, 31);
            return false;
        }
        const int hit = __ffs(past) - 1;
        request_ = base + hit;
        tiles_ = __shfl_sync(0xffffffffu, lane_tiles, hit);
        item_begin_ += __shfl_sync(0xffffffffu, inclusive - own, hit);
        return true;
    }

    const DecodeParams& p_;
    int share_, position_, end_;
    int request_ = 0, row_group_ = 0, item_begin_ = 0, tiles_ = 0;
    u32 streamed_ = 0;
};
