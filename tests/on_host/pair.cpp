// Runs a pair of CTAs of decode_pair.cu on the CPU, every thread of both, with scores that are made up instead of multiplied:
// loads and messages land late and out of order, warps are slow, and what comes out has to be the attention of those scores.
// usage: pair SEED CASES; says "ok" or what went wrong.
#define __global__
#define __shared__
#define __align__(bytes)
#define __cluster_dims__(...)
#define __launch_bounds__(...)
#define __grid_constant__
// What hardware.h does not set aside of ptx.cuh.
#define smem_address ptx_smem_address
#define cluster_rank ptx_cluster_rank
#define map_shared ptx_map_shared
#define store_async ptx_store_async
#define cluster_sync ptx_cluster_sync
#define moved ptx_moved
#define ldmatrix_x4 ptx_ldmatrix_x4
#define wgmma_fence ptx_wgmma_fence
#define wgmma_commit ptx_wgmma_commit
#define wgmma_wait ptx_wgmma_wait
#define wgmma_fence_operands ptx_wgmma_fence_operands
#define wgmma_rs_n64 ptx_wgmma_rs_n64
#define wgmma_ss ptx_wgmma_ss
#define wgmma_ss_n64_narrow ptx_wgmma_ss_n64_narrow
#define wgmma_rs_n ptx_wgmma_rs_n
#include "hardware.h"
#undef smem_address
#undef cluster_rank
#undef map_shared
#undef store_async
#undef cluster_sync
#undef moved
#undef ldmatrix_x4
#undef wgmma_fence
#undef wgmma_commit
#undef wgmma_wait
#undef wgmma_fence_operands
#undef wgmma_rs_n64
#undef wgmma_ss
#undef wgmma_ss_n64_narrow
#undef wgmma_rs_n

// A shared address is a CTA's number and an offset, as it is on the GPU.
static u32 smem_address(const void* pointer);
static u32 cluster_rank() { return cta; }
static u32 map_shared(u32 address, u32 rank) { return (address & 0xffffff) | rank << 24; }
static void store_async(u32 address, u32 barrier, u32 a, u32 b, u32 c, u32 d);
static void cluster_sync() {}
static u32 moved(u32 value) { return value; }
static void ldmatrix_x4(u32 (&)[4], u32) {}
static void wgmma_fence() {}
static void wgmma_commit() {}
template <int kPending>
static void wgmma_wait();
template <int kCount>
static void wgmma_fence_operands(float (&)[kCount]) {}
static void score(float (&s)[32], u32 keys, bool accumulate, bool rotary);
static void wgmma_rs_n64(float (&s)[32], const u32 (&)[4], u32 keys, bool accumulate) { score(s, keys, accumulate, false); }
template <int, int, int>
static void wgmma_ss(float (&s)[32], u32, u32 keys, bool accumulate) {
    score(s, keys, accumulate, false);
}
static void wgmma_ss_n64_narrow(float (&s)[32], u32, u32 keys, bool accumulate) { score(s, keys, accumulate, true); }
template <int kN>
static void wgmma_rs_n(float (&o)[kN / 2], const u32 (&a)[4], u32 values, bool);
static u32 pack_bf16(float low, float high) {
    const auto rounded = [](float x) {
        const u32 bits = __builtin_bit_cast(u32, x);
        return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    };
    return rounded(low) | rounded(high) << 16;
}
#define pack_elements pack_bf16
static void __syncthreads() {}
#include "decode_pair.cu"

char shared[1];  // of the kernel itself, which does not run here
static DecodeParams params;
static SharedMemory memory[2];
static std::vector<std::function<void()>> late;  // loads and messages under way
static std::vector<int> table, lengths;
static std::vector<u16> out;
static std::vector<float> lse;
static int large_percent, moving_percent;  // of scores: those past kLargeScore; those that move the reference
static u32 salt;

static bool is_of_tiles(const void*) { return true; }
static void red_add_release(u32*, u32) { fail("an item was split"); }
static u32 smem_address(const void* pointer) {
    for (u32 which = 0; which < 2; ++which) {
        const auto offset = static_cast<const char*>(pointer) - reinterpret_cast<const char*>(&memory[which]);
        if (offset >= 0 && offset < static_cast<long>(sizeof(SharedMemory))) return which << 24 | static_cast<u32>(offset);
    }
    fail("an address outside shared memory");
    return 0;
}
static char* at(u32 address) { return reinterpret_cast<char*>(&memory[address >> 24]) + (address & 0xffffff); }

// ---- what lands late ---------------------------------------------------------------------------------------------------
static void store_async(u32 address, u32 barrier, u32 a, u32 b, u32 c, u32 d) {
    const uint4 words{a, b, c, d};
    late.push_back([=] {
        std::memcpy(at(address), &words, sizeof words);
        Barrier& complete = found(reinterpret_cast<const u64*>(at(barrier)));
        complete.bytes -= sizeof words;
        complete.settle();
    });
}
static void tma_load_3d(void* smem, const TensorMap* map, u64* barrier, int x, int y, int z) {
    const bool rotary = map == &params.rotary_map || map == &params.q_rotary_map;
    const bool query = map == &params.q_map || map == &params.q_rotary_map;
    *static_cast<Stamp*>(smem) = {kSpoiled};
    late.push_back([=] {
        *static_cast<Stamp*>(smem) = {query ? kQuery : kKeyValue, x, y, z};
        Barrier& complete = found(barrier);
        complete.bytes -= rotary ? kBoxBytes / 2 : kBoxBytes;
        complete.settle();
    });
}
static void tma_load_5d(void*, const TensorMap*, u64*, int, int, int, int, int) { fail("no pieces here"); }

// ---- products: a box is looked at when its product is issued, and until that is waited for --------------------------------
struct Reading {
    const Stamp* box;
    Stamp stamp;
};
static std::vector<Reading> readings[2][384];

static Stamp read_box(u32 descriptor) {  // of the box that it points into, a step of it or more
    const u32 offset = (descriptor & 0x3fff) << 4, ring = static_cast<u32>(reinterpret_cast<char*>(&memory[0].ring) - reinterpret_cast<char*>(&memory[0]));
    const u32 in_ring = offset - ring, in_tile = in_ring % sizeof(HalfTile), box = min(in_tile / kBoxBytes, 4u) * kBoxBytes;
    if (in_ring / sizeof(HalfTile) >= HalfTileRing::kSlots) fail("an operand is not in the ring");
    const auto* stamp = reinterpret_cast<const Stamp*>(at(cta << 24 | (offset - in_tile + box)));
    if (stamp->kind != kKeyValue) fail("an operand is no tile");
    readings[cta][threadIdx.x].push_back({stamp, *stamp});
    return *stamp;
}
template <int kPending>
static void wgmma_wait() {
    if (chance(30)) pause_fiber();
    for (const Reading& reading : readings[cta][threadIdx.x])
        if (!(*reading.box == reading.stamp)) fail("a tile was overwritten under a product");
    readings[cta][threadIdx.x].clear();
}

// ---- scores: of a page's number; row and token -------------------------------------------------------------------------
static u32 mixed(u32 a, u32 b, u32 c) {
    u32 h = (a * 2654435761u ^ (b + 77) * 2246822519u ^ (c + 1234) * 3266489917u) + salt;
    h ^= h >> 15, h *= 2654435761u, h ^= h >> 13;
    return h;
}
static float score_of(int page, int row, int token) {
    const u32 h = mixed(page, row, token);
    float s = static_cast<float>(h % 64) / 16.f - 2.f;
    if (h / 64 % 1000 < static_cast<u32>(moving_percent)) s += 8.f;
    if (mixed(page, row / 40, 99) % 100 < static_cast<u32>(large_percent) && token == 5) s += 13.f;
    return s;
}
static float share_of(int page, int row, int token) { return static_cast<float>(mixed(row, token, page) % 128) / 8.f - 8.f; }  // CTA 0's
static float value_of(int page) { return 1.f + static_cast<float>(page % 5); }
static int local_row(u32 slot) { return static_cast<int>(threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4 + slot * 8); }
static int row_of(u32 slot) { return static_cast<int>(threadIdx.x / kWarpgroup * 64) + (local_row(slot) ^ static_cast<int>(cta * 8)); }

static void score(float (&s)[32], u32 keys, bool accumulate, bool rotary) {
    const Stamp box = read_box(keys);
    for (int i = 0; i < 32; ++i) {
        if (!accumulate) s[i] = 0.f;
        if (!rotary) continue;  // all of it comes with the two rotary steps
        const int row = row_of(i / 2 % 2), token = i / 4 * 8 + static_cast<int>(threadIdx.x % 4) * 2 + i % 2;
        const float own = share_of(box.z, row, token);
        s[i] += (cta == 0 ? own : score_of(box.z, row, token) - own) / 2.f;
    }
}
template <int kN>
static void wgmma_rs_n(float (&o)[kN / 2], const u32 (&a)[4], u32 values, bool) {
    for (int i = 0; i < kN / 2; ++i) {  // the thread's own tokens alone: four neighbours have a row
        const Stamp box = read_box(values + i / 32 * (kBoxBytes >> 4));
        const float2 first = unpack_elements(a[i / 2 % 2]), second = unpack_elements(a[i / 2 % 2 + 2]);
        o[i] += (first.x + first.y + second.x + second.y) * value_of(box.z);
    }
}

// ---- a case ------------------------------------------------------------------------------------------------------------
static void make_batch() {
    const int b = 1 + static_cast<int>(below(4)), max_pages = 14;
    lengths.assign(b, 0), table.assign(b * max_pages, 0);
    for (int i = 0; i < b; ++i) {
        lengths[i] = chance(10) ? 0 : static_cast<int>(below((chance(50) ? 3 : max_pages) * kTileTokens + 1));
        for (int k = 0; k < max_pages; ++k) table[i * max_pages + k] = i * 1000 + k;
    }
    params.b = b, params.cache_seqlens = lengths.data(), params.block_table = table.data();
    params.max_pages = params.table_stride = max_pages, params.num_pages = 1 << 20;
    params.row_blocks = params.row_groups = 1, params.items_each = b, params.item_parts = 0;
    params.s_q = 1 + static_cast<int>(below(2)), params.h_q = 128 / params.s_q - static_cast<int>(chance(50) ? 0 : below(40));
    params.causal = chance(50), params.softmax_scale_log2 = 1.f;
    gridDim = {2, 1};
    salt = below(1u << 30), large_percent = chance(60) ? 0 : 2 + static_cast<int>(below(30)), moving_percent = chance(50) ? 0 : 4;
    const size_t rows = static_cast<size_t>(b) * params.s_q * params.h_q;
    out.assign(rows * kHeadDimV, 0xffff), lse.assign(rows, 1e9f);
    params.out = out.data(), params.lse = lse.data();
}
static void check_results() {
    for (int i = 0; i < params.b; ++i)
        for (int row = 0; row < params.s_q * params.h_q; ++row) {
            const int s = row / params.h_q, h = row % params.h_q;
            const int end = params.causal ? lengths[i] - params.s_q + 1 + s : lengths[i];
            double sum = 0, weighted = 0;
            for (int token = 0; token < end; ++token) {
                const int page = table[i * params.max_pages + token / kTileTokens];
                const double p = std::exp2(static_cast<double>(score_of(page, row, token % kTileTokens)));
                sum += p, weighted += p * value_of(page);
            }
            const float found = lse[(static_cast<size_t>(i) * params.h_q + h) * params.s_q + s];
            const double expected = sum == 0 ? -INFINITY : std::log(sum);
            if (!(found == expected || std::fabs(found - expected) < 1e-3)) fail("an LSE is not that of its scores");
            const u16* result = out.data() + (static_cast<size_t>(i) * params.s_q * params.h_q + row) * kHeadDimV;
            for (int j = 0; j < kHeadDimV / 8; ++j) {
                double all = 0;
                for (int k = 0; k < 8; ++k) all += __builtin_bit_cast(float, static_cast<u32>(result[j * 8 + k]) << 16) / 2;
                if (!(std::fabs(all - (sum == 0 ? 0 : weighted / sum)) < 0.02 * (1 + all))) fail("a result is not that of its scores");
            }
        }
}
static void thread_main() {
    SharedMemory& smem = memory[cta];
    const int warp = static_cast<int>(threadIdx.x) / 32;
    blockIdx = {cta, 0};
    if (warp == kMergeThreads / 32) schedule_items(*new (smem.range[threadIdx.x & 31]) WorkRange(params), smem.queue);
    else if (warp == kMergeThreads / 32 + 1) load_half_tiles(params, smem);
    else if (warp < kMergeThreads / 32) attend(params, smem);
}
static void play(std::vector<Warp>& warps) {
    const u32 count = static_cast<u32>(warps.size()), lag = below(count), landing = 5 + below(95), newest_first = below(100);
    long seen = progress, idle = 0;
    for (u32 left = count; left > 0;) {
        if (progress != seen) seen = progress, idle = 0;
        if (++idle > 50'000) fail("nothing moves: a deadlock");
        for (u32 i = 0; i < 64 && !late.empty() && chance(landing); ++i) {
            const size_t which = chance(newest_first) ? late.size() - 1 : below(static_cast<u32>(late.size()));
            const auto land = late[which];
            late.erase(late.begin() + static_cast<long>(which));
            land();
        }
        const u32 next = below(count);
        Warp& warp = warps[next];
        if (warp.left == 0 || warp.stuck == progress || (next == lag && !chance(5))) continue;
        bool stuck = true;
        for (Fiber& lane : warp.lanes)
            if (run(lane)) stuck = false;
        if (stuck) warp.stuck = progress;
        left -= warp.left == 0;
    }
    if (!late.empty()) fail("a message was never waited for");
}

int main(int, char** arguments) {
    generator.seed(static_cast<u32>(std::atoi(arguments[1])));
    cta_threads = kThreads;
    std::vector<Warp> warps(2 * kThreads / 32);
    for (int round = std::atoi(arguments[2]); round > 0; --round) {
        make_batch();
        barriers.clear(), late.clear();
        std::memset(static_cast<void*>(named), 0, sizeof named);
        for (SharedMemory& smem : memory) {
            std::memset(static_cast<void*>(&smem), 0xff, sizeof smem);
            smem.init_barriers();
        }
        for (u32 i = 0; i < warps.size(); ++i) start(warps[i], i * 32, thread_main);
        play(warps);
        check_results();
    }
    std::puts("ok");
}
