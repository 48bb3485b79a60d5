// One CTA's shared memory, what it is to decode and what must come out of it. What score and value warpgroups do to a tile is
// made up here, in the order of waits and releases of decode_rows.cu and decode_swapped.cu; so are the parts of items.
#pragma once
#include "hardware.h"
//
#include <map>
//
#include "persistent.cuh"
#include "query.cuh"

constexpr int kRows = MLA_ROWS;
constexpr bool kStreamedQueries = kRows == kTileTokens;  // decode_rows.cu
static_assert(!kGathers, "no page sizes under 8 here");
constexpr int kRegisterBoxes = MLA_REGISTER_STEPS / kStepsPerBox, kAheadBoxes = MLA_AHEAD_BOXES;
constexpr int kQueryRows = kStreamedQueries ? 8 : kRows;  // in memory of their own
constexpr u32 kQueryBoxBytes = kRows * kBoxColumns * 2;
constexpr int kValueWarps = kValueThreads / 32, kMaxCtas = 132;
using Slot = PartialSlot<kRows>;

static DecodeParams params;

struct SharedMemory {
    alignas(1024) TileRing ring;
    alignas(1024) QueryBuffer<kQueryRows> q;
    ItemSums<kRows> sums;
    ItemQueue queue;
    WorkItem to_merge;

    void init_barriers() { q.init_barriers(); }
    void fetch_queries(const DecodeParams& p) {
        if constexpr (!kStreamedQueries) ::fetch_queries<kQueryRows>(p, q, queue);
    }
};
static SharedMemory smem;

static void __syncthreads() { named_barrier_sync(0, kThreads); }
static bool is_of_tiles(const void* place) {
    const char *at = static_cast<const char*>(place), *tiles = reinterpret_cast<const char*>(&smem.ring);
    return at >= tiles && at + 16 <= tiles + TileRing::kBytes;
}
template <class Body>
static void by_warp(Body body) {  // what a warp does as one
    if (threadIdx.x % 32 == 0) body();
    __syncwarp();
}

// What this CTA has to do, found before it starts.
struct Tile {
    const WorkItem* item = nullptr;
    int tile = 0;
    bool scored = false;
};
static std::vector<WorkItem> plan;
static std::vector<Tile> tiles;  // by ordinal
static std::vector<int> table, lengths, starts;
static std::vector<u32> arrivals;
static std::vector<Slot> partials(2 * kMaxCtas);
static std::vector<u16> out;
static std::vector<float> lse;
static std::map<const u16*, std::vector<char>> stored;  // vectors of the result at this place

static int page_of(const WorkItem& w, int tile) { return table[w.request * params.max_pages + tile]; }
static bool page_is_bad(const WorkItem& w) {
    if constexpr (kPageIsTile) {
        for (int tile = w.begin; tile < w.end; ++tile)
            if (page_of(w, tile) < 0) return true;
    } else {
        for (int token = w.begin * kTileTokens; token < min(w.end * kTileTokens, w.kv_len); ++token)
            if (page_of(w, token >> params.page_shift) < 0) return true;
    }
    return false;
}
static const WorkItem* item_at(const u16* place) {
    for (const WorkItem& w : plan)
        if (place == out_row(params, first_query(params, w), w.row_block * kRows)) return &w;
    fail("a result goes where none of this CTA's does");
    return nullptr;
}

// ---- parts: the stats and O (exact in fp16) that a part is made to have, so that results can be foretold --------------
static RowStats stats_of(const WorkItem& w, int part, int row) {
    const float n = part == w.part ? w.end - w.begin : 1.f + part;
    return {static_cast<float>((part + row) & 3), n + 0.5f, n};
}
static float output_of(const WorkItem& w, int part, int owner, int j, int element) {
    const u32 mixed = (part * 7919u + owner * 104729u + j * 1299709u + element * 15485863u) * 2654435761u;
    return part == w.part ? w.end - w.begin : 1.f + static_cast<float>(mixed >> 22) / 1024.f;
}
static float4 output_of(const WorkItem& w, int part, int owner, int j) {
    return make_float4(output_of(w, part, owner, j, 0), output_of(w, part, owner, j, 1), output_of(w, part, owner, j, 2),
                       output_of(w, part, owner, j, 3));
}
static bool is_close(float found, float expected) { return std::fabs(found - expected) < 1e-5f * (1.f + std::fabs(expected)); }

static bool is_written(const WorkItem& w, int warp) {  // by this CTA, a value warp's share
    const Slot& slot = partial_slot<kRows>(params, w.first_cta, w.part);
    for (int row = 0; row < kRows; ++row) {
        const RowStats stats = stats_of(w, w.part, row);
        if (std::memcmp(&slot.stats[row], &stats, sizeof stats) != 0) return false;
    }
    for (int i = 0; i < kWarpUnits<kRows>; ++i)
        for (int lane = 0; lane < 32; ++lane) {
            float4 found[kUnitVectors];
            unpack_unit(slot.o[warp][i][lane], found);
            for (int k = 0; k < kUnitVectors; ++k) {
                const float4 o = output_of(w, w.part, warp * 32 + lane, i * kUnitVectors + k), v = found[k];
                const float one = slot.one[warp];
                if (v.x * one != o.x || v.y * one != o.y || v.z * one != o.z || v.w * one != o.w) return false;
            }
        }
    return true;
}
static void red_add_release(u32* pointer, u32 value) {
    for (const WorkItem& w : plan)
        if (w.parts > 1 && pointer == &params.arrivals[2 * w.first_cta] && !is_written(w, threadIdx.x / 32))
            fail("a part was announced before it was written");
    atomic_add_relaxed(pointer, value);
}

// ---- other CTAs: each warp leaves its share of a part; who merges a slice leaves when it has --------------------------
struct Other {
    const WorkItem* item;
    int part, warp;  // -1: a slice is merged
};
static std::vector<Other> others;

static int slice_begin(const WorkItem& w, int part) { return kWarpUnits<kRows> * (kStreamedQueries ? 4 : 8) * part / w.slices; }
static bool try_to_leave(const Other& other) {
    const WorkItem& w = *other.item;
    u32* arrived = &params.arrivals[2 * w.first_cta];
    if (other.warp < 0) {
        const bool empty = slice_begin(w, other.part) == slice_begin(w, other.part + 1);
        if (arrived[0] < static_cast<u32>(w.parts * kValueWarps) && !empty) return false;
        if (++arrived[1] == static_cast<u32>(w.slices)) arrived[0] = arrived[1] = 0;
    } else {
        Slot& slot = partial_slot<kRows>(params, w.first_cta, other.part);
        for (int row = 0; row < kRows; ++row) slot.stats[row] = stats_of(w, other.part, row);
        const float one = kUnitVectors == 1 ? 1.f : std::ldexp(1.f, static_cast<int>(below(8)) - 4);  // any that keeps them in range
        for (int i = 0; i < kWarpUnits<kRows>; ++i)
            for (int lane = 0; lane < 32; ++lane) {
                float4 o[kUnitVectors];
                for (int k = 0; k < kUnitVectors; ++k) o[k] = output_of(w, other.part, other.warp * 32 + lane, i * kUnitVectors + k);
                slot.o[other.warp][i][lane] = pack_unit(o, 1.f / one);
            }
        slot.one[other.warp] = one;
        ++arrived[0];
    }
    ++progress;
    return true;
}
static void let_one_leave() {
    const size_t which = below(static_cast<u32>(others.size()));
    if (try_to_leave(others[which])) others[which] = others.back(), others.pop_back();
}

// ---- boxes -----------------------------------------------------------------------------------------------------------
static void send(const Landing& landing) {
    in_flight.push_back(landing);
    for (u32 i = 0; i < landing.stamps; ++i)
        *reinterpret_cast<Stamp*>(static_cast<char*>(landing.smem) + landing.bytes / landing.stamps * i) = {kSpoiled};
}
static void tma_load_3d(void* box, const TensorMap* map, u64* barrier, int x, int y, int z) {
    const int kind = map == &params.q_map ? kQuery : kKeyValue;
    const bool piece = !kPageIsTile && kind == kKeyValue;
    const int rows = piece ? min(1 << params.page_shift, kTileTokens) : 0;
    const u32 bytes = kind == kQuery ? kQueryBoxBytes : piece ? rows * 128 : kBoxBytes, stamps = piece ? rows / 8 : 4;
    send({box, barrier, bytes, stamps, piece ? 8 : 0, 1, {kind, x, y, z}});
}
// A piece of a group: eight rows of each of its boxes side by side.
static void tma_load_5d(void* box, const TensorMap*, u64* barrier, int x, int y, int z, int u, int v) {
    const u32 stamps = min(1 << params.page_shift, kTileTokens) / 8 * kGroupBoxes;
    send({box, barrier, stamps * 1024, stamps, 8, kGroupBoxes, {kKeyValue, z * kBoxColumns + x, u * 8 + y, v}});
}

// Reads a box, and takes its time. Rows from `rows` on are to be zero.
static void read(void* box, u32 bytes, const Stamp& expected, int rows = kTileTokens) {
    for (int i = 0; i < 2; ++i) {
        for (int quarter = 0; quarter < 4; ++quarter)
            if (!(stamp_of(box, bytes, quarter) == (quarter * kTileTokens / 4 < rows ? expected : Stamp{})))
                fail("a reader found another box's data");
        if (i == 0) dawdle();
    }
}
static Stamp key(u32 ordinal, int c) {
    const Tile& t = tiles.at(ordinal);
    return {kKeyValue, c * kBoxColumns, 0, page_of(*t.item, t.tile)};
}
// Rows 8 i ... of a tile that came in pieces; what is past the end is no page.
static Stamp key_piece(u32 ordinal, int c, int i) {
    const Tile& t = tiles.at(ordinal);
    const int token = t.tile * kTileTokens + i * 8, rows = min(1 << params.page_shift, kTileTokens);
    const bool valid = (token & -rows) < min(t.item->end * kTileTokens, t.item->kv_len);
    const int page = valid ? page_of(*t.item, token >> params.page_shift) : -1;
    return {kKeyValue, c * kBoxColumns, token & ((1 << params.page_shift) - 1), page};
}
static void read_key(u32 ordinal, int c, int rows = kTileTokens) {
    char* box = reinterpret_cast<char*>(smem.ring.box(ordinal, c));
    if (kPageIsTile) return read(box, kBoxBytes, key(ordinal, c), rows);
    for (int again = 0; again < 2; ++again) {
        for (int i = 0; i < 8; ++i)
            if (!(*reinterpret_cast<Stamp*>(box + i * (c == kRotaryBox ? 1024 : kRowsStride)) == (i * 8 < rows ? key_piece(ordinal, c, i) : Stamp{})))
                fail("a reader found another box's data");
        if (again == 0) dawdle();
    }
}
static void read_query(const WorkItem& w, void* box, int c) {
    read(box, kQueryBoxBytes, {kQuery, c * kBoxColumns, query_row(params, w, w.row_block * kRows), query_plane(w)});
}

// ---- the two roles ---------------------------------------------------------------------------------------------------
struct Scores {
    const DecodeParams& p;
    const u32 thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32;
    u32 items = 0;

    Scores(const DecodeParams& p, SharedMemory&) : p(p) {}

    void begin(const WorkItem& w) {
        if (!kStreamedQueries) return mbarrier_wait(&smem.q.full, items++ & 1);
        for (int c = 0; c < kBoxes; ++c) {
            if (c == kRegisterBoxes) named_barrier_sync(kBarrierScore, kScoreThreads);
            smem.ring.wait_box(w.ordinal - 1, c);
            by_warp([&] { read_query(w, smem.ring.query_box(w.ordinal - 1, c), c); });
        }
        named_barrier_sync(kBarrierScore, kScoreThreads);
        smem.ring.release_unscored(w.ordinal - 1);
    }

    static void multiply(u32 ordinal, int begin, int end) {
        for (int c = begin; c < end; ++c) smem.ring.wait_box(ordinal, c);
    }

    void tiles(const WorkItem& w, int tile, int end, u32 ordinal) {
        float s[1];
        multiply(ordinal, 0, kAheadBoxes);
        for (; tile < end; ++tile, ++ordinal) {
            multiply(ordinal, kAheadBoxes, kBoxes);
            by_warp([&] {
                for (int c = 0; c < kBoxes; ++c) {
                    read_key(ordinal, c);
                    if (!kStreamedQueries) read_query(w, smem.q.box[c], c);
                }
            });
            multiply(tile + 1 < end ? ordinal + 1 : ordinal, 0, kAheadBoxes);
            finish_tile(*this, smem.ring, w, tile, ordinal, s);
        }
    }
    void mask(const WorkItem&, int, float (&)[1]) {}
    void keep(float (&)[1]) {}
    void softmax(u32, float (&)[1]) {
        named_barrier_sync(kBarrierScore, kScoreThreads);  // all have read the rotary box
    }
    void store_p(u32 ordinal, float (&)[1]) {
        by_warp([&] {
            dawdle();
            stamp_of(smem.ring.box(ordinal, kRotaryBox), kBoxBytes, warp) = probabilities(ordinal);
            ::tiles.at(ordinal).scored = true;
        });
    }

    void end(const WorkItem& w, float* sums) {
        if (!kStreamedQueries && lane == 0) mbarrier_arrive(&smem.q.empty);
        named_barrier_sync(kBarrierScore, kScoreThreads);
        if (w.invalid != page_is_bad(w)) fail("a page outside the pool was not reported in time");
        dawdle();
        for (int row = static_cast<int>(thread); row < kRows; row += kScoreThreads)
            write_stats<kRows>(p, w, row, stats_of(w, w.part, row), sums);
    }

    static Stamp probabilities(u32 ordinal) { return {kProbabilities, static_cast<int>(ordinal), 0, 0}; }
};

struct FakeFragment {  // rows as in decode_rows.cu or decode_swapped.cu
    static constexpr int kThreadRows = kStreamedQueries ? 2 : kRows / 4, kWarpRows = kStreamedQueries ? 16 : kRows;
    static constexpr int kWarpStride = kStreamedQueries ? 16 : 0, kSlotStep = kStreamedQueries ? 2 : 1, kStoreVectors = 2;

    static constexpr int slot(int j, int element) { return kStreamedQueries ? element / 2 : j % (kRows / 8) * 2 + (element & 1); }
    static u32 row(u32 thread, u32 slot) {
        return kStreamedQueries ? thread / 32 % 4 * 16 + thread % 32 / 4 + slot * 8 : slot / 2 * 8 + thread % 4 * 2 + (slot & 1);
    }
    static void mark(const u16* place, u32 thread, int j) {
        auto& vectors = stored[place];
        vectors.resize(kValueThreads * kVectors<kRows>);
        if (vectors.at(thread * kVectors<kRows> + j)++ > 0) fail("a result is stored twice");
    }
    static void store_one(u16* place, u32 rows, u32 thread, int j, float4 v) {
        const WorkItem& w = *item_at(place);
        mark(place, thread, j);
        if (rows != static_cast<u32>(valid_rows<kRows>(params, w))) fail("a result has other rows");
        const float found[] = {v.x, v.y, v.z, v.w};
        for (int element = 0; element < 4; ++element) {
            const auto row = static_cast<int>(FakeFragment::row(thread, slot(j, element)));
            float o = 0.f, n = 0.f;
            for (int part = 0; part < w.parts; ++part) {
                const RowStats stats = stats_of(w, part, row);
                const auto weight = static_cast<float>(1 << static_cast<int>(stats.m));
                o += weight * output_of(w, part, static_cast<int>(thread), j, element);
                n += weight * stats.n;
            }
            if (!is_close(found[element], o / n)) fail("a result is not that of its parts");
        }
    }
    template <class Packed>
    static void store(u16* place, u32, u32 thread, int j, Packed packed) {
        for (int i = 0; i < kStoreVectors; ++i) {
            mark(place, thread, j + i);
            for (int half = 0; half < 2; ++half)
                if (!is_close(__builtin_bit_cast(float, packed(i, half)), 1.f)) fail("a result is not that of its tiles");
        }
    }
};

struct Values {
    using Fragment = FakeFragment;
    const u32 half;
    float4 o[kVectors<kRows>];

    Values(const DecodeParams&, SharedMemory&, u32 half) : half(half) {}

    void reset() { std::fill(std::begin(o), std::end(o), make_float4(0.f, 0.f, 0.f, 0.f)); }
    void tile(u32 ordinal) {
        smem.ring.wait_scored(ordinal);
        if (!tiles.at(ordinal).scored) fail("a tile was multiplied before it was scored");
        for (float4& v : o) v = make_float4(v.x + 1.f, v.y + 1.f, v.z + 1.f, v.w + 1.f);
        by_warp([&] { read_operands(ordinal); });
        smem.ring.release(ordinal, half);
    }
    void read_operands(u32 ordinal) const {
        const Tile& t = tiles.at(ordinal);
        for (u32 c = half * kGroupBoxes; c < (half + 1) * kGroupBoxes; ++c)
            read_key(ordinal, c, t.item->kv_len - t.tile * kTileTokens);
        read(smem.ring.box(ordinal, kRotaryBox), kBoxBytes, Scores::probabilities(ordinal));
    }
    float4 vector(int j) const { return o[j]; }
};
