// Runs one CTA of the kernels on the CPU, without its arithmetic: the warps of schedule.cuh, producer.cuh, loader.cuh,
// query.cuh, merge.cuh and persistent.cuh themselves, against mbarriers and copies at their worst. What score and value
// warpgroups do to a tile is made up here, in the order of waits and releases of decode_rows.cu and decode_swapped.cu.
// usage: rings SEED CASES; says "ok" or what went wrong.
#include "hardware.h"
//
#include "persistent.cuh"
#include "query.cuh"

constexpr int kRows = MLA_ROWS;
constexpr bool kStreamedQueries = kRows == kTileTokens;  // decode_rows.cu
constexpr int kRegisterBoxes = MLA_REGISTER_STEPS / kStepsPerBox, kAheadBoxes = MLA_AHEAD_BOXES;
constexpr u32 kQueryBoxBytes = kRows * kBoxColumns * 2;
using Slot = PartialSlot<kRows>;

struct SharedMemory {
    alignas(1024) TileRing ring;
    QueryBuffer<kRows> q;
    ItemSums<kRows> sums;
    ItemQueue queue;
    WorkItem to_merge;
    u64 part_written;
};
static SharedMemory smem;
static DecodeParams params;

// What this CTA has to do, found before it starts.
struct Tile {
    const WorkItem* item;
    int tile;
    bool scored;
};
static std::vector<WorkItem> plan;
static std::map<u32, Tile> tiles;  // by ordinal
static std::vector<int> table, lengths;
static int max_pages;

static int page_of(const WorkItem& w, int tile) { return table[w.request * max_pages + tile]; }
static bool page_is_bad(const WorkItem& w) {
    for (int tile = w.begin; tile < w.end; ++tile)
        if (page_of(w, tile) < 0) return true;
    return false;
}

// ---- parts: the stats and O that a part is made to have, so that results can be foretold ------------------------------
static float reference_of(int part, int row) { return static_cast<float>((part + row) & 3); }
static float sum_of(const WorkItem& w, int part) { return part == w.part ? w.end - w.begin : 1.f + part; }
static float output_of(const WorkItem& w, int part, int g, int j, int thread) {
    return part == w.part ? w.end - w.begin : part + 0.01f * j + 0.001f * thread + 0.5f * g;
}
static RowStats stats_of(const WorkItem& w, int part, int row) {
    return {reference_of(part, row), sum_of(w, part), sum_of(w, part)};
}

struct Other {  // a part that another CTA leaves
    const WorkItem* item;
    int part;
};
static std::vector<Other> others;

static void leave(const Other& other) {
    const WorkItem& w = *other.item;
    Slot& slot = partial_slot<kRows>(params, w.first_cta, other.part);
    for (int row = 0; row < kRows; ++row) slot.stats[row] = stats_of(w, other.part, row);
    for (int g = 0; g < 2; ++g)
        for (int j = 0; j < kVectors<kRows>; ++j)
            for (int thread = 0; thread < kWarpgroup; ++thread) {
                const float v = output_of(w, other.part, g, j, thread);
                slot.o[g][j][thread] = make_float4(v, v, v, v);
            }
    ++params.arrivals[2 * w.first_cta];
    ++progress;
}

static u32 atomic_add_acq_rel(u32* pointer, u32 value) {
    const auto counter = static_cast<int>(pointer - params.arrivals);
    for (const WorkItem& w : plan) {
        if (w.parts == 1 || 2 * w.first_cta != counter) continue;
        Slot& slot = partial_slot<kRows>(params, w.first_cta, w.part);
        bool written = true;
        for (int row = 0; row < kRows; ++row) written &= slot.stats[row].n == sum_of(w, w.part);
        for (int warp = 0; warp < 8; ++warp)  // lane 0 alone stands for it
            for (int j = 0; j < kVectors<kRows>; ++j) written &= slot.o[warp / 4][j][warp % 4 * 32].x == sum_of(w, w.part);
        if (!written) fail("a part was announced before it was written");
    }
    return atomic_add_relaxed(pointer, value);
}

// ---- boxes -----------------------------------------------------------------------------------------------------------
static void tma_load_3d(void* box, const TensorMap* map, u64* barrier, int x, int y, int z) {
    const int kind = map == &params.q_map ? kQuery : kKeyValue;
    const u32 bytes = kind == kQuery ? kQueryBoxBytes : kBoxBytes;
    for (u32 i = 0; i < 4; ++i) stamp_of(box, bytes, i) = {kSpoiled};
    in_flight.push_back({static_cast<char*>(box), barrier, bytes, {kind, x, y, z}, nullptr, {}});
}

// Reads a box, and takes its time.
static void read(void* box, u32 bytes, const Stamp& expected) {
    for (int i = 0; i < 2; ++i) {
        for (u32 quarter = 0; quarter < 4; ++quarter)
            if (!(stamp_of(box, bytes, quarter) == expected)) fail("a reader found another box's data");
        if (i == 0) dawdle();
    }
}
static void read_key(u32 ordinal, int c) {
    const Tile& t = tiles.at(ordinal);
    read(smem.ring.box(ordinal, c), kBoxBytes, {kKeyValue, c * kBoxColumns, 0, page_of(*t.item, t.tile)});
}
static void read_query(const WorkItem& w, void* box, int c) {
    read(box, kQueryBoxBytes, {kQuery, c * kBoxColumns, w.row_block * kRows, w.request});
}

// ---- the two roles ---------------------------------------------------------------------------------------------------
struct Scores {
    const DecodeParams& p;
    const u32 warp = threadIdx.x % kWarpgroup / 32;
    u32 items = 0;

    Scores(const DecodeParams& p, SharedMemory&) : p(p) {}

    void begin(const WorkItem& w) {
        if (!kStreamedQueries) return mbarrier_wait(&smem.q.full, items++ & 1);
        for (int c = 0; c < kBoxes; ++c) {
            if (c == kRegisterBoxes) named_barrier_sync(kBarrierScore, kScoreThreads);
            smem.ring.wait_box(w.ordinal - 1, c);
            read_query(w, smem.ring.box(w.ordinal - 1, c), c);
        }
        named_barrier_sync(kBarrierScore, kScoreThreads);
        each_lane([&] { smem.ring.release_unscored(w.ordinal - 1); });
    }

    static void multiply(u32 ordinal, int begin, int end) {
        for (int c = begin; c < end; ++c) smem.ring.wait_box(ordinal, c);
    }

    void tiles(const WorkItem& w, int tile, int end, u32 ordinal) {
        multiply(ordinal, 0, kAheadBoxes);
        for (; tile < end; ++tile, ++ordinal) {
            multiply(ordinal, kAheadBoxes, kBoxes);
            for (int c = 0; c < kBoxes; ++c) read_key(ordinal, c);
            if (!kStreamedQueries)
                for (int c = 0; c < kBoxes; ++c) read_query(w, smem.q.box[c], c);
            multiply(tile + 1 < end ? ordinal + 1 : ordinal, 0, kAheadBoxes);
            named_barrier_sync(kBarrierScore, kScoreThreads);  // all have read the rotary box
            dawdle();
            stamp_of(smem.ring.box(ordinal, kRotaryBox), kBoxBytes, warp) = probabilities(ordinal);
            ::tiles.at(ordinal).scored = true;
            smem.ring.publish(ordinal);
        }
    }

    void end(const WorkItem& w, float* sums) {
        if (!kStreamedQueries) mbarrier_arrive(&smem.q.empty);
        if (w.invalid != page_is_bad(w)) fail("a page outside the pool was not reported in time");
        for (int row = static_cast<int>(warp); row < kRows; row += 4)
            write_stats<kRows>(p, w, row, stats_of(w, w.part, row), smem.ring, sums, smem.sums.weights);
    }

    static Stamp probabilities(u32 ordinal) { return {kProbabilities, static_cast<int>(ordinal), 0, 0}; }
};

static u32 last_tile[8];  // that a value warp has multiplied

struct FakeFragment {
    static constexpr int kThreadRows = 2, kWarpRows = kRows < 16 ? kRows : 16, kWarpStride = kStreamedQueries ? 16 : 0;
    static constexpr int kStoreVectors = 2;

    static constexpr int slot(int, int element) { return element / 2; }
    static u32 row(u32 thread, u32 slot) { return (thread / 32 * 2 + slot) % kRows; }
    static void store_one(u16*, u32, u32, int, float4) {}
    template <class Packed>
    static void store(u16*, u32, u32 thread, int j, Packed packed) {
        const WorkItem& w = *tiles.at(last_tile[thread / 32]).item;
        for (int i = 0; i < kStoreVectors; ++i)
            for (int half = 0; half < 2; ++half) {
                const auto row = static_cast<int>(FakeFragment::row(thread, half));
                float o = 0.f, n = 0.f;
                for (int part = 0; part < w.parts; ++part) {
                    const float weight = std::exp2(reference_of(part, row));
                    o += weight * output_of(w, part, thread / kWarpgroup, j + i, thread % kWarpgroup);
                    n += weight * sum_of(w, part);
                }
                const float found = __builtin_bit_cast(float, packed(i, half));
                if (!(std::fabs(found - o / n) < 1e-4f * (1.f + o / n))) fail("a result is not that of its parts");
            }
    }
};

template <int kHalf>
struct Values {
    using Fragment = FakeFragment;
    float4 o[kVectors<kRows>];

    Values(const DecodeParams&, SharedMemory&) {}

    void reset() { std::fill(std::begin(o), std::end(o), make_float4(0.f, 0.f, 0.f, 0.f)); }
    void tile(u32 ordinal) {
        smem.ring.wait_scored(ordinal);
        if (!tiles.at(ordinal).scored) fail("a tile was multiplied before it was scored");
        for (int c = kHalf * kGroupBoxes; c < (kHalf + 1) * kGroupBoxes; ++c) read_key(ordinal, c);
        read(smem.ring.box(ordinal, kRotaryBox), kBoxBytes, Scores::probabilities(ordinal));
        for (float4& v : o) v = make_float4(v.x + 1.f, v.y + 1.f, v.z + 1.f, v.w + 1.f);
        last_tile[threadIdx.x / 32] = ordinal;
        each_lane([&] { smem.ring.release(ordinal, kHalf); });
    }
    float4 vector(int j) const { return o[j]; }
    void set_vector(int j, float4 v) { o[j] = v; }
};

// ---- a case: a batch, and one of the CTAs that decode it -------------------------------------------------------------
struct Batch {
    std::vector<u16> out;
    std::vector<float> lse;
    std::vector<u32> arrivals;
    std::vector<Slot> partials;

    Batch() {
        const int b = 1 + static_cast<int>(chance(30) ? 0 : below(6));
        max_pages = chance(20) ? 70 : 12;
        lengths.assign(b, 0), table.assign(b * max_pages, 0);
        for (int i = 0; i < b; ++i) {
            lengths[i] = chance(5) ? -1 : static_cast<int>(below(max_pages * kPageTokens + 1));
            for (int k = 0; k < max_pages; ++k) table[i * max_pages + k] = chance(1) ? -1 : i * 1000 + k;
        }
        params.b = b;
        params.cache_seqlens = lengths.data();
        params.block_table = table.data();
        params.max_pages = params.table_stride = max_pages;
        params.num_pages = 1 << 20;
        params.row_blocks = 1 + static_cast<int>(below(3));
        params.group = 1 + static_cast<int>(below(2));
        params.row_groups = (params.row_blocks + params.group - 1) / params.group;
        params.s_q = 1;
        params.h_q = params.row_blocks * kRows;
        gridDim.x = params.group * (1 + below(chance(50) ? 4 : 12));
        blockIdx.x = below(gridDim.x);
        out.resize(static_cast<size_t>(b) * params.h_q * kHeadDimV);
        lse.resize(static_cast<size_t>(b) * params.h_q);
        arrivals.assign(2 * gridDim.x, 0);
        partials.resize(2 * gridDim.x);
        std::memset(partials.data(), 0xff, partials.size() * sizeof(Slot));
        params.out = out.data(), params.lse = lse.data(), params.arrivals = arrivals.data();
        params.partials = reinterpret_cast<float*>(partials.data());
    }
};

static void make_plan(std::vector<Fiber>& fibers, Warp& warp) {
    plan.clear(), tiles.clear(), others.clear();
    for (int i = 0; i < 32; ++i)
        start(fibers[i], &warp, i, [] {
            WorkRange range(params);
            for (WorkItem w; range.next(w);)
                if (threadIdx.x == 0) plan.push_back(w);
        });
    for (bool busy = true; busy;) {
        busy = false;
        for (int i = 0; i < 32; ++i)
            if (!fibers[i].finished) run(fibers[i]), busy = true;
    }
    for (const WorkItem& w : plan) {
        for (int tile = w.begin; tile < w.end; ++tile) tiles[w.ordinal + tile - w.begin] = {&w, tile, false};
        if (merges(w)) params.arrivals[2 * w.first_cta + 1] = w.parts - 2;  // the others have left
        if (merges(w) || absorbs(w))
            for (int part = 0; part < w.parts; ++part)
                if (part != w.part) others.push_back({&w, part});
    }
}

static void check_counters() {
    for (const WorkItem& w : plan) {
        if (!is_split(w)) continue;
        const u32 left = !merges(w) && !absorbs(w);  // for those that do
        if (params.arrivals[2 * w.first_cta] != left || params.arrivals[2 * w.first_cta + 1] != 0)
            fail("counters are not as the next launch expects them");
    }
}

int main(int, char** arguments) {
    generator.seed(static_cast<u32>(std::atoi(arguments[1])));
    constexpr int kWarps = 12 + 1 + !kStreamedQueries;  // that one fiber stands for: values, scores, announcer, queries
    std::vector<Fiber> fibers(64 + kWarps);
    std::vector<Warp> warps(2);
    for (int round = std::atoi(arguments[2]); round > 0; --round) {
        const Batch batch;
        std::fill(warps.begin(), warps.end(), Warp{});
        make_plan(fibers, warps[0]);
        barriers.clear(), in_flight.clear();
        smem.ring.init_barriers(), smem.q.init_barriers(), smem.sums.init_barriers(), smem.queue.init_barriers();
        mbarrier_init(&smem.part_written, kValueThreads / 32);
        smem.to_merge.request = -1;
        std::fill(warps.begin(), warps.end(), Warp{});
        for (int i = 0; i < 32; ++i) {
            start(fibers[i], &warps[0], 384 + i, [] { schedule_items(params, smem.queue); });
            start(fibers[32 + i], &warps[1], 416 + i, [] { load_items<kRows>(params, smem.ring, smem.queue); });
        }
        for (int i = 0; i < kWarps; ++i)
            start(fibers[64 + i], nullptr, i < 12 ? i * 32 : 448 + (i - 12) * 32, [i] {
                if (i < 4) value_items<kRows, Values<0>>(params, smem);
                else if (i < 8) value_items<kRows, Values<1>>(params, smem);
                else if (i < 12) score_items<kRows, Scores, FakeFragment>(params, smem);
                else if (i == 12) announce_parts(params, smem.queue, &smem.part_written);
                else fetch_queries<kRows>(params, smem.q, smem.queue);
            });
        const u32 lag = below(static_cast<u32>(fibers.size()));  // a warp or lane that hardly gets to run
        const u32 landing = 1 + below(15), newest_first = below(100);
        const u32 hurry = chance(50) ? 2000 : 1'000'000'000;  // of other CTAs; not at all: when nothing else moves
        long seen = progress, idle = 0;
        while (std::any_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return !fiber.finished; })) {
            if (progress != seen) seen = progress, idle = 0;
            if (++idle > 200'000) fail("nothing moves: a deadlock");
            if (!in_flight.empty() && chance(landing)) land_one(newest_first);
            if (!others.empty() && (below(hurry) < landing || idle > 20'000)) {
                const size_t which = below(static_cast<u32>(others.size()));
                leave(others[which]);
                others.erase(others.begin() + static_cast<long>(which));
            }
            const u32 next = below(static_cast<u32>(fibers.size()));
            if ((next == lag && !chance(5)) || fibers[next].finished) continue;
            run(fibers[next]);
        }
        if (!in_flight.empty()) fail("a load was never waited for");
        check_counters();
    }
    std::puts("ok");
}
