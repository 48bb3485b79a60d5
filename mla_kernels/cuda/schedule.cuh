// Who does what: every CTA finds its share of the batch from the lengths on the device, with no plan step.
//
// The batch is a line of work units. Each (request, row group) is an item: `kItemUnits` units for its fixed cost, then
// one unit a 64-token tile. A row group is grid_blocks() row blocks, whose CTAs walk the same tiles at the same time, so that
// the second reads KV from L2. The line is cut into gridDim.y equal shares; an item cut by a share's end is split, and its
// parts are merged by the CTAs that hold them (parts.cuh). One warp walks the share.
#pragma once
#include "layout.cuh"

struct alignas(64) DecodeParams {
    TensorMap kv_map;          // (576 columns, page_size tokens, num_pages), boxes of 64 x min(page_size, 64); or a TokenPool
    TensorMap q_map;           // (576 columns, s_q * h_q rows, b), boxes of 64 x a CTA's rows; where kRagged all rows, 1
    u16* out;                  // (b, s_q, h_q, 512)
    float* lse;                // (b, h_q, s_q), natural log
    const int* block_table;    // (b, max_pages)
    const int* cache_seqlens;  // (b,)
    float* partials;           // two slots a CTA (parts.cuh)
    u32* arrivals;             // two counters a CTA, zero between launches
    float softmax_scale_log2;  // softmax_scale * log2(e)
    int b, s_q, h_q, num_pages, max_pages, table_stride, row_blocks, row_groups, causal;
    int items_each;  // b * row_groups items over the groups of CTAs: so many each, or 0,
    int item_parts;  // where there are more groups, and so many an item
    // What follows is read where kRagged only.
    const int* cu_seqlens_q;  // (b + 1,), where each sequence's query tokens begin; or null: s_q each
    int page_shift;           // log2 of the page size
    int max_tokens;           // that a row of the page table has room for
    int total_q;              // query tokens
#if MLA_PAGE_SIZE == 0  // kPieces
    TensorMap rotary_map;  // (576 columns, page_size tokens, num_pages); kv_map is (64 columns, 8 tokens, 9 boxes, page_size / 8, num_pages)
#elif MLA_ROWS == 128  // kPairRows
    TensorMap rotary_map, q_rotary_map;  // as kv_map and q_map, boxes of 32 columns, 64-byte swizzle
#endif
};

// Where tokens are that warps gather: it stands in the place of kv_map.
struct TokenPool {
    const u16 *kv, *q;
    long long page_stride, token_stride;  // elements
};

__device__ __forceinline__ int max_tokens(const DecodeParams& p) {
    if constexpr (kPageIsTile) return p.max_pages * kPageTokens;
    else return p.max_tokens;
}

struct WorkItem {
    int request, kv_len, tiles;
    int row_block;         // of this CTA
    int begin, end;        // this CTA's tiles
    u32 ordinal;           // of its first tile among all that this CTA streams (the queries of decode_rows.cu count)
    int first_cta;         // the CTA that holds the item's first tile (same place in its group)
    int part, parts;       // which of the item's parts this is, of how many
    int slices;            // CTAs that have a part as their last item
    bool invalid;  // a length outside the table, or (set while its tiles stream in) a page outside the pool: NaN
#if MLA_PAGE_SIZE < 64  // kRagged
    int first_query, queries;  // tokens among all, and of this sequence
    int seen_by_all;           // positions that every one of them sees
#endif
};

// Query tokens of an item's sequence, and those before it.
template <class Item>
__device__ __forceinline__ int query_tokens(const DecodeParams& p, const Item& w) {
    if constexpr (kRagged) return w.queries;
    else return p.s_q;
}
// Positions that all of them see.
template <class Item>
__device__ __forceinline__ int seen_by_all(const DecodeParams& p, const Item& w) {
    if constexpr (kRagged) return w.seen_by_all;
    else return w.kv_len - (p.causal ? p.s_q - 1 : 0);
}
template <class Item>
__device__ __forceinline__ long long first_query(const DecodeParams& p, const Item& w) {
    if constexpr (kRagged) return w.first_query;
    else return static_cast<long long>(w.request) * p.s_q;
}
// Where an item's rows are in q_map: its row and plane.
template <class Item>
__device__ __forceinline__ int query_row(const DecodeParams& p, const Item& w, int row) {
    if constexpr (kRagged) return w.first_query * p.h_q + row;
    else return row;
}
template <class Item>
__device__ __forceinline__ int query_plane(const Item& w) {
    if constexpr (kRagged) return 0;
    else return w.request;
}
// Query tokens of a sequence, and those before it, read; what points outside the tensors is cut.
__device__ __forceinline__ int find_queries(const DecodeParams& p, int request, int& first) {
    first = request * p.s_q;
    if (p.cu_seqlens_q == nullptr) return p.s_q;
    first = min(max(p.cu_seqlens_q[request], 0), p.total_q);
    return min(max(p.cu_seqlens_q[request + 1], first), p.total_q) - first;
}

// a / b of what is not negative, below 2^20. Short code, as all here: it runs once and is in no cache then.
__device__ __forceinline__ int divide(int a, int b) {
    int quotient = static_cast<int>(__fdividef(static_cast<float>(a), static_cast<float>(b)));  // or one more, or less
    quotient -= quotient * b > a;
    return quotient + (a - quotient * b >= b);
}

// Row blocks side by side, and which of them is this CTA's; a pair of CTAs has one (decode_pair.cu).
__device__ __forceinline__ u32 grid_blocks() { return gridDim.x / kClusterCtas; }
__device__ __forceinline__ u32 grid_block() { return blockIdx.x / kClusterCtas; }

class WorkRange {
   public:
    __device__ explicit WorkRange(const DecodeParams& p) : p_(p) {
        const int lane = threadIdx.x & 31, groups = gridDim.y;
        int sum = 0, least = 0x7fffffff, most = 0, units = 0;
#pragma unroll 4
        for (int i = lane; i < p.b; i += 32) {
            const int n = tiles(i);
            sum += n, least = min(least, n), most = max(most, n);
            if constexpr (kRagged) units += row_groups(i) * (n + kItemUnits);
        }
        sum = __reduce_add_sync(0xffffffffu, sum);
        least = __reduce_min_sync(0xffffffffu, least), most = __reduce_max_sync(0xffffffffu, most);
        if constexpr (kRagged) units = __reduce_add_sync(0xffffffffu, units);
        else units = p.row_groups * (sum + p.b * kItemUnits);
        share_ = max(divide(units + groups - 1, groups), kMinTiles);
        const bool uniform = least == most && most > 0 && !(kRagged && p.cu_seqlens_q != nullptr);
        if (uniform) align(most);
        const int total = kRagged && !uniform ? units : p.row_groups * (sum + p.b * item_units_);
        position_ = blockIdx.y * share_;
        end_ = min(position_ + share_, total);
        if (position_ >= end_) return;
        bool found = uniform;
        if (uniform) {
            tiles_ = most;
            request_ = divide(position_, p.row_groups * (most + item_units_));
            item_begin_ = request_ * (p.row_groups * (most + item_units_));
        }
        // (short code here: at a launch it is in no cache, but the lengths are by now)
#pragma unroll 1
        for (int base = 0; !found && base < p.b; base += 32) found = find(base, base + lane < p.b ? tiles(base + lane) : -item_units_);
        row_group_ = divide(position_ - item_begin_, tiles_ + item_units_);  // skip those that end before the share
        item_begin_ += row_group_ * (tiles_ + item_units_);
    }

    // The next item of which this CTA has tiles, or which is empty and starts in this share; false and a negative request
    // after the last. Every lane writes the same to `w`, which may lie in shared memory: registers are few here.
    __device__ bool next(WorkItem& w) {
        while (position_ < end_) {
            const int first_tile = item_begin_ + item_units_;
            const int item_end = first_tile + tiles_;
            const int stop = min(end_, item_end);
            w.request = request_;
            if constexpr (kRagged) find_queries_of(w);
            w.kv_len = p_.cache_seqlens[request_];
            w.invalid = w.kv_len < 0 || w.kv_len > max_tokens(p_);
            w.tiles = tiles_;
            w.row_block = row_group_ * grid_blocks() + grid_block();
            // (What decides is not read from `w`, which other lanes may already be writing anew.)
            const bool active = row_group_ * grid_blocks() + grid_block() < row_blocks(request_);
            const int begin = max(position_ - first_tile, 0), end = max(stop - first_tile, 0);
            w.begin = begin, w.end = end;
            w.ordinal = streamed_ + kQueryTiles;
            const int group = divide((threadIdx.x & 1) == 0 ? first_tile : item_end - 1, share_);  // two at once
            const int first_group = __shfl_sync(0xffffffffu, group, 0), last_group = __shfl_sync(0xffffffffu, group, 1);
            w.first_cta = first_group * grid_blocks() + grid_block();
            w.part = blockIdx.y - first_group;
            w.parts = tiles_ > 0 ? last_group - first_group + 1 : 1;
            w.slices = w.parts - ((last_group + 1) * share_ != item_end);  // or the last part's CTA goes on
            const bool owns = tiles_ > 0 ? begin < end : position_ == item_begin_;
            const bool streams = tiles_ > 0;
            position_ = stop;
            if (position_ == item_end) {
                item_begin_ = item_end;
                if (++row_group_ == row_groups(request_)) {
                    row_group_ = 0;
                    ++request_;
                    if constexpr (kRagged)
                        while (request_ < p_.b && row_groups(request_) == 0) ++request_;
                    if (position_ < end_) tiles_ = tiles(request_);
                }
            }
            if (owns && active) {
                if (streams) streamed_ += kQueryTiles + end - begin;
                return true;
            }
        }
        w.request = -1;
        return false;
    }

   private:
    static constexpr int kItemUnits = MLA_ITEM_UNITS, kMinTiles = MLA_MIN_TILES, kAlignPercent = MLA_ALIGN_PERCENT;
    static constexpr u32 kQueryTiles = MLA_ROWS / kTileTokens;  // an item's queries come as tiles of their own
    static_assert(kItemUnits > 0, "an empty request needs a unit to be found by");

    // All items have `tiles` tiles: lets a share's ends fall on theirs, or on those of equal parts, where that costs little:
    // then a share holds one part, and where no item is split nothing is merged.
    __device__ void align(int tiles) {
        const bool whole = p_.items_each > 0;
        const int parts = max(min(p_.item_parts, tiles / kMinTiles), 1);
        const int share = whole ? p_.items_each * (tiles + kItemUnits) : divide(tiles + parts - 1, parts);
        if (share * 100 > (share_ + 1) * (100 + kAlignPercent)) return;
        share_ = share;
        if (!whole) item_units_ = parts * share - tiles;
    }

    __device__ int tiles(int request) const {
        const int length = p_.cache_seqlens[request];
        return length < 0 || length > max_tokens(p_) ? 0 : (length + kTileTokens - 1) / kTileTokens;
    }
    __device__ int row_blocks(int request) const {
        if constexpr (!kRagged) return p_.row_blocks;
        if (p_.cu_seqlens_q == nullptr) return p_.row_blocks;
        int first;
        return (find_queries(p_, request, first) * p_.h_q + MLA_ROWS - 1) / MLA_ROWS;
    }
    template <class Item>
    __device__ void find_queries_of(Item& w) const {
        if constexpr (kRagged) {
            w.queries = find_queries(p_, request_, w.first_query);
            w.seen_by_all = p_.cache_seqlens[request_] - (p_.causal ? w.queries - 1 : 0);
        }
    }
    __device__ int row_groups(int request) const {
        if constexpr (!kRagged) return p_.row_groups;
        if (p_.cu_seqlens_q == nullptr) return p_.row_groups;
        return divide(row_blocks(request) + grid_blocks() - 1, grid_blocks());
    }
    __device__ int units_of(int request, int tiles) const {
        if constexpr (kRagged)
            if (request >= p_.b) return 0;
        return row_groups(request) * (tiles + item_units_);
    }

    // Whether one of 32 requests from `base` on holds `position_`; the lanes give their tiles, and item_begin_ advances.
    __device__ bool find(int base, int lane_tiles) {
        const int lane = threadIdx.x & 31, own = units_of(base + lane, lane_tiles);
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
    int item_units_ = kItemUnits;
    u32 streamed_ = 0;
};
