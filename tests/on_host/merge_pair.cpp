// Runs the end of a split item of 128 rows on the CPU: pairs of CTAs leave their parts and merge them, one CTA at a time, every
// thread of it, with made-up O and sums (exact in fp16). Every vector of the result has to be stored once, and be its parts'.
// usage: merge_pair SEED CASES; says "ok" or what went wrong.
#define cluster_rank ptx_cluster_rank
#include "hardware.h"
#undef cluster_rank

static u32 cluster_rank() { return cta; }
static void __syncthreads() {}
#include "fragment.cuh"
#include "merge.cuh"

constexpr int kRows = MLA_ROWS, kTiles = 4 * 36 * 1024, kWarpsOfCta = kValueThreads / 32 / kClusterCtas;
using Slot = PartialSlot<kRows>;

static DecodeParams params;
static std::vector<Slot> partials;
static std::vector<u32> arrivals;
static std::vector<float> lse;
static std::vector<u16> out(kRows* kHeadDimV);
static std::vector<float4> stored;  // by value thread and vector
static std::vector<int> times;
alignas(1024) static char memory[kTiles];
static WorkItem item;
static u32 salt;

static bool is_of_tiles(const void* place) { return place >= memory && static_cast<const char*>(place) + 16 <= memory + kTiles; }
static void tma_load_3d(void*, const TensorMap*, u64*, int, int, int) { fail("nothing is loaded here"); }
static void tma_load_5d(void*, const TensorMap*, u64*, int, int, int, int, int) { fail("nothing is loaded here"); }
static void red_add_release(u32* pointer, u32 value) { atomic_add_relaxed(pointer, value); }

static float made_up(u32 part, u32 thread, u32 j, u32 element) {  // 11 bits, and warps of other magnitudes
    const u32 mixed = (part * 7919u + thread * 104729u + j * 1299709u + element * 15485863u + salt) * 2654435761u;
    return std::ldexp(1.f + static_cast<float>(mixed >> 22) / 1024.f, static_cast<int>(thread / 32 * 5 + part) % 9 - 4);
}
static RowStats stats_of(int part, int row) { return {static_cast<float>((part + row) & 3), 2.5f + part, 2.f + part}; }

struct Values {
    u32 part;
    float4 vector(int j) const {
        const u32 t = value_thread();
        return make_float4(made_up(part, t, j, 0), made_up(part, t, j, 1), made_up(part, t, j, 2), made_up(part, t, j, 3));
    }
};
struct Kept : RowsFragment {
    static void store_one(u16*, u32 rows, u32 thread, int j, float4 v) {
        if (rows != static_cast<u32>(valid_rows<kRows>(params, item))) fail("a result has other rows");
        stored.at(thread * kVectors<kRows> + j) = v;
        ++times.at(thread * kVectors<kRows> + j);
    }
};

static void run_cta_of(u32 rank, u32 part, const std::function<void()>& body) {
    static std::vector<Warp> warps(kWarpsOfCta);
    for (int i = 0; i < kWarpsOfCta; ++i) start(warps[i], rank * cta_threads + i * 32, body);
    blockIdx = {rank, part};
    long seen = progress, idle = 0;
    for (int left = 1; left > 0;) {
        left = 0;
        for (Warp& warp : warps) {
            for (Fiber& lane : warp.lanes)
                if (!lane.finished) run(lane);
            left += warp.left;
        }
        idle = progress == seen ? idle + 1 : 0, seen = progress;
        if (idle > 1000) fail("nothing moves: a deadlock");
    }
}

static void make_item() {
    salt = generator();
    const int parts = 2 + static_cast<int>(below(chance(50) ? 8 : 65));
    gridDim = {kClusterCtas, static_cast<u32>(parts)};
    item = {};
    item.tiles = parts, item.parts = parts, item.slices = parts - static_cast<int>(below(2));
    partials.assign(2 * parts, Slot{});
    std::memset(static_cast<void*>(partials.data()), 0xff, partials.size() * sizeof(Slot));
    arrivals.assign(2 * parts, 0), lse.assign(kRows, 1e9f);
    stored.assign(kValueThreads * kVectors<kRows>, float4{}), times.assign(stored.size(), 0);
    params.b = params.s_q = 1, params.h_q = kRows - static_cast<int>(below(kRows));
    params.partials = reinterpret_cast<float*>(partials.data()), params.arrivals = arrivals.data();
    params.out = out.data(), params.lse = lse.data();
}
static void leave_parts() {
    for (int part = 0; part < item.parts; ++part) {
        item.part = part;
        for (int row = 0; row < kRows; ++row) partial_slot<kRows>(params, 0, part).stats[row] = stats_of(part, row);
        for (u32 rank = 0; rank < kClusterCtas; ++rank) run_cta_of(rank, part, [part] {
            Values values{static_cast<u32>(part)};
            write_part<kRows>(params, item, values);
        });
    }
}
static void merge_parts() {
    for (item.part = 0; item.part < item.slices; ++item.part)
        for (u32 rank = 0; rank < kClusterCtas; ++rank) run_cta_of(rank, item.part, [] {
            Merge<kRows, Kept, kTiles>{params, item, memory}();
            leave_merge(params, item);
        });
}
static void check_results() {
    const auto is_close = [](double found, double expected) { return std::fabs(found - expected) < 1e-5 * (1 + std::fabs(expected)); };
    for (u32 thread = 0; thread < kValueThreads; ++thread)
        for (int j = 0; j < kVectors<kRows>; ++j) {
            const size_t place = thread * kVectors<kRows> + j;
            if (times[place] != 1) fail(times[place] ? "a result is stored twice" : "a result was not stored");
            const float found[] = {stored[place].x, stored[place].y, stored[place].z, stored[place].w};
            for (int element = 0; element < 4; ++element) {
                double o = 0, n = 0;
                for (int part = 0; part < item.parts; ++part) {
                    const RowStats stats = stats_of(part, static_cast<int>(Kept::row(thread, Kept::slot(j, element))));
                    o += std::exp2(stats.m) * made_up(part, thread, j, element), n += std::exp2(stats.m) * stats.n;
                }
                if (!is_close(found[element], o / n)) fail("a result is not that of its parts");
            }
        }
    for (int row = 0; row < kRows; ++row) {
        double sum = 0;
        for (int part = 0; part < item.parts; ++part) sum += std::exp2(stats_of(part, row).m) * stats_of(part, row).l;
        if (row < params.h_q ? !is_close(lse[row], std::log(sum)) : lse[row] != 1e9f) fail("an LSE is not that of its parts");
    }
    for (const u32 left : arrivals)
        if (left != 0) fail("counters are not as the next launch expects them");
}

int main(int, char** arguments) {
    generator.seed(static_cast<u32>(std::atoi(arguments[1])));
    cta_threads = kThreads;
    for (int round = std::atoi(arguments[2]); round > 0; --round) {
        make_item(), leave_parts(), merge_parts(), check_results();
        for (const Copies& own : copies)
            if (!own.all.empty()) fail("a copy was never waited for");
    }
    std::puts("ok");
}
