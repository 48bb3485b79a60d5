// Runs one CTA of the kernels on the CPU, without its arithmetic: run_cta of persistent.cuh and all that it calls, every
// thread of it, against mbarriers and copies at their worst, and merges parts that slow other CTAs leave.
// usage: rings SEED CASES; says "ok" or what went wrong.
#include "roles.h"

// ---- a case: a batch, and one of the CTAs that decode it -------------------------------------------------------------
static void make_batch() {
    const int b = 1 + static_cast<int>(chance(30) ? 0 : below(6));
    params.page_shift = kPageIsTile ? 6 : 3 + static_cast<int>(below(6));
    const int max_tokens = max((chance(20) ? 70 : 12) * kTileTokens, 1 << params.page_shift) >> params.page_shift << params.page_shift;
    const int max_pages = max_tokens >> params.page_shift;
    const bool uniform = chance(30);
    lengths.assign(b, 0), table.assign(b * max_pages, 0);
    for (int i = 0; i < b; ++i) {
        lengths[i] = chance(5) ? -1 : static_cast<int>(below(max_tokens + 1));
        if (uniform) lengths[i] = lengths[0];
        for (int k = 0; k < max_pages; ++k) table[i * max_pages + k] = below(kPageIsTile ? 100 : 1000) == 0 ? -1 : i * 1000 + k;
    }
    params.b = b;
    params.cache_seqlens = lengths.data();
    params.block_table = table.data();
    params.max_pages = params.table_stride = max_pages;
    params.num_pages = 1 << 20;
    params.row_blocks = 1 + static_cast<int>(below(3));
    gridDim.x = 1 + below(2);
    gridDim.y = 1 + below(chance(50) ? 4 : chance(80) ? 12 : kMaxCtas / 2);
    blockIdx = {below(gridDim.x), below(gridDim.y)};
    params.row_groups = (params.row_blocks + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
    const int items = b * params.row_groups, groups = static_cast<int>(gridDim.y);
    params.items_each = items >= groups ? (items + groups - 1) / groups : 0;
    params.item_parts = items < groups ? groups / items : 0;
    params.s_q = 1;
    params.h_q = params.row_blocks * kRows - static_cast<int>(chance(50) ? 0 : below(kRows));
    params.total_q = b, params.max_tokens = max_tokens, params.cu_seqlens_q = nullptr;
    if (!kPageIsTile && chance(50)) {  // query tokens of their own number
        starts.assign(1, 0);
        for (int i = 0; i < b; ++i) starts.push_back(starts.back() + static_cast<int>(below(4)));
        params.cu_seqlens_q = starts.data(), params.total_q = starts.back();
        params.h_q = 1 + static_cast<int>(below(kRows));
    }
    out.resize(static_cast<size_t>(params.total_q) * params.h_q * kHeadDimV);
    lse.assign(static_cast<size_t>(params.total_q) * params.h_q, 1e9f);
    arrivals.assign(2 * kMaxCtas, 0);
    params.out = out.data(), params.lse = lse.data(), params.arrivals = arrivals.data();
    params.partials = reinterpret_cast<float*>(partials.data());
}

static void make_plan(Warp& warp) {
    plan.clear(), tiles.clear(), others.clear(), stored.clear();
    start(warp, 0, [] {
        WorkRange range(params);
        for (WorkItem w; range.next(w);)
            if (threadIdx.x == 0) plan.push_back(w);
    });
    run_alone(warp);
    for (const WorkItem& w : plan) {
        if (w.tiles > 0) tiles.resize(w.ordinal + w.end - w.begin);
        for (int tile = w.begin; tile < w.end; ++tile) tiles[w.ordinal + tile - w.begin] = {&w, tile, false};
        for (int part = 0; part < w.parts && is_split(w); ++part) {
            std::memset(&partial_slot<kRows>(params, w.first_cta, part), 0xff, sizeof(Slot));
            if (!merges(w) || part == w.part) continue;
            for (int warp = part < w.slices ? -1 : 0; warp < kValueWarps; ++warp) others.push_back({&w, part, warp});
        }
    }
}

// What is left when all have gone.
static void check_results() {
    std::vector<float> expected(lse.size(), 1e9f);
    size_t results = 0;
    for (const WorkItem& w : plan) {
        if (is_split(w)) {
            for (int warp = 0; warp < kValueWarps; ++warp)
                if (!is_written(w, warp)) fail("a part is not what was written");
            const u32 left = merges(w) ? 0 : kValueWarps;  // for those that merge it
            if (params.arrivals[2 * w.first_cta] != left || params.arrivals[2 * w.first_cta + 1] != 0)
                fail("counters are not as the next launch expects them");
        }
        const int runs = kStreamedQueries ? 2 : 1, units = kWarpUnits<kRows> * kValueWarps / runs;
        const int begin = !is_split(w) ? 0 : merges(w) ? slice_begin(w, w.part) : units;
        const int end = !is_split(w) || !merges(w) ? units : slice_begin(w, w.part + 1);
        for (int row = 0; row < valid_rows<kRows>(params, w); ++row) {
            const int unit = kStreamedQueries ? row / 16 * kWarpUnits<kRows> : 0;
            float sum = 0.f;
            for (int part = 0; part < w.parts; ++part) {
                const RowStats stats = stats_of(w, part, row);
                sum += std::exp2(stats.m) * stats.l;
            }
            const int own = w.row_block * kRows + row, s = own / params.h_q, h = own % params.h_q;
            const int first = static_cast<int>(first_query(params, w));
            const int place = params.cu_seqlens_q ? h * params.total_q + first + s : w.request * params.h_q + own;
            if (unit < begin || unit >= end) continue;
            expected[place] = w.tiles ? std::log(sum) : w.invalid ? kNan : -kInfinity;
        }
        if (w.tiles == 0 || begin == end) continue;
        ++results;
        const auto& vectors = stored[out_row(params, first_query(params, w), w.row_block * kRows)];
        if (std::count(vectors.begin(), vectors.end(), 1) != (end - begin) * kUnitVectors * runs * 32) fail("a result was not stored");
        for (int i = 0; i < static_cast<int>(vectors.size()); ++i) {
            const int warp = i / kVectors<kRows> / 32 % (kValueWarps / runs);
            const int unit = warp * kWarpUnits<kRows> + i % kVectors<kRows> / kUnitVectors;
            if (vectors[i] != (begin <= unit && unit < end)) fail("a result of another slice was stored");
        }
    }
    if (stored.size() != results) fail("a result was stored that is another's");
    for (size_t i = 0; i < lse.size(); ++i)
        if (!(lse[i] == expected[i] || is_close(lse[i], expected[i]) || (std::isnan(lse[i]) && std::isnan(expected[i]))))
            fail("an LSE is not that of its parts");
}

static void play(std::vector<Warp>& warps) {
    const u32 lag = below(16), lag_lane = chance(50) ? below(32) : 32;  // a warp, or a lane of it, that hardly gets to run
    const u32 landing = 1 + below(60), newest_first = below(100);       // percent
    u32 hurry = chance(50) ? 1 + below(30) : 0;  // of other CTAs; not at all: when nothing else moves
    long seen = progress, idle = 0;
    for (u32 left = 16; left > 0;) {
        if (progress != seen) seen = progress, idle = 0;
        if (++idle > 20'000) fail("nothing moves: a deadlock");
        if (idle > 1000) hurry = 50;
        if (!in_flight.empty() && chance(landing)) land_one(newest_first);
        if (!others.empty() && chance(hurry)) let_one_leave();
        const u32 next = below(16);
        Warp& warp = warps[next];
        if (warp.left == 0 || warp.stuck == progress) continue;
        const bool lags = next == lag && !chance(5);
        if (lags && lag_lane == 32) continue;
        const u32 first = below(32), lanes = chance(80) ? 32 : 1 + below(31);
        bool stuck = lanes == 32 && !lags;
        for (u32 i = first; i < first + lanes; ++i)
            if (!(lags && i % 32 == lag_lane) && run(warp.lanes[i % 32])) stuck = false;
        if (stuck) warp.stuck = progress;
        left -= warp.left == 0;
    }
    if (!in_flight.empty()) fail("a load was never waited for");
    for (const Copies& own : copies)
        if (!own.all.empty()) fail("a copy was never waited for");
    for (long tries = 0; !others.empty(); ++tries) {
        if (tries > 1'000'000) fail("another CTA cannot leave");
        let_one_leave();
    }
}

int main(int, char** arguments) {
    generator.seed(static_cast<u32>(std::atoi(arguments[1])));
    std::vector<Warp> warps(kThreads / 32);
    for (int round = std::atoi(arguments[2]); round > 0; --round) {
        make_batch();
        make_plan(warps[0]);
        barriers.clear(), in_flight.clear();
        std::memset(static_cast<void*>(&smem), 0xff, sizeof smem);
        for (u32 i = 0; i < warps.size(); ++i)
            start(warps[i], i * 32, [] { run_cta<kRows, Scores, Values>(params, smem); });
        play(warps);
        check_results();
    }
    std::puts("ok");
}
