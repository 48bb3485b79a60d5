// What ptx.cuh does with one instruction each, on the CPU and at its worst: copies land late and out of order, and spoil the
// place they go to from the start; other CTAs are slow.
#pragma once
#include "warp.h"
//
#include <cstring>
#include <random>

// ptx.cuh's own are asm: set them aside, and give the same names a meaning here.
#define mbarrier_init ptx_mbarrier_init
#define mbarrier_arrive ptx_mbarrier_arrive
#define mbarrier_arrive_expect_tx ptx_mbarrier_arrive_expect_tx
#define mbarrier_wait ptx_mbarrier_wait
#define fence_barrier_init ptx_fence_barrier_init
#define named_barrier_sync ptx_named_barrier_sync
#define named_barrier_arrive ptx_named_barrier_arrive
#define tma_load_3d ptx_tma_load_3d
#define tma_load_5d ptx_tma_load_5d
#define copy_async ptx_copy_async
#define copy_async_commit ptx_copy_async_commit
#define copy_async_wait ptx_copy_async_wait
#define fence_proxy_async ptx_fence_proxy_async
#define griddepcontrol_launch_dependents ptx_griddepcontrol_launch_dependents
#define griddepcontrol_wait ptx_griddepcontrol_wait
#define setmaxnreg_inc ptx_setmaxnreg_inc
#define setmaxnreg_dec ptx_setmaxnreg_dec
#define load_acquire ptx_load_acquire
#define red_add_release ptx_red_add_release
#define atomic_add_relaxed ptx_atomic_add_relaxed
#define exp2_approx ptx_exp2_approx
#define pack_elements ptx_pack_elements
#define pack_halves ptx_pack_halves
#define unpack_halves ptx_unpack_halves
#define launder ptx_launder
#include "ptx.cuh"
#undef mbarrier_init
#undef mbarrier_arrive
#undef mbarrier_arrive_expect_tx
#undef mbarrier_wait
#undef fence_barrier_init
#undef named_barrier_sync
#undef named_barrier_arrive
#undef tma_load_3d
#undef tma_load_5d
#undef copy_async
#undef copy_async_commit
#undef copy_async_wait
#undef fence_proxy_async
#undef griddepcontrol_launch_dependents
#undef griddepcontrol_wait
#undef setmaxnreg_inc
#undef setmaxnreg_dec
#undef load_acquire
#undef red_add_release
#undef atomic_add_relaxed
#undef exp2_approx
#undef pack_elements
#undef pack_halves
#undef unpack_halves
#undef launder

static std::mt19937 generator;
static u32 below(u32 count) { return static_cast<u32>(generator() % count); }
static bool chance(u32 percent) { return below(100) < percent; }

static void fail(const char* what) {
    std::puts(what);
    std::exit(1);
}
static void dawdle() {
    while (chance(30)) pause_fiber();
}

static u32 launder(u32 value) { return value; }
static void fence_barrier_init() {}
static void fence_proxy_async() {}
static void griddepcontrol_launch_dependents() {}
static void griddepcontrol_wait() {}
template <int>
static void setmaxnreg_inc() {}
template <int>
static void setmaxnreg_dec() {}
static float exp2_approx(float x) { return std::exp2(x); }
static u32 pack_halves(float low, float high) {
    const _Float16 two[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
    return __builtin_bit_cast(u32, two);
}
static float2 unpack_halves(u32 packed) {
    struct {
        _Float16 low, high;
    } two = __builtin_bit_cast(decltype(two), packed);
    return {static_cast<float>(two.low), static_cast<float>(two.high)};
}
static u32 pack_elements(float low, float high) { return __builtin_bit_cast(u32, low == high ? low : kNan); }

// ---- barriers ----------------------------------------------------------------------------------------------------
struct Barrier {
    u32 count, pending, phase = 0;
    int bytes = 0;

    void settle() {
        ++progress;
        if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
    }
    void arrive(u32 arrivals) {
        if (pending < arrivals) fail("an arrival too many in a phase: the hardware raises an illegal instruction");
        pending -= arrivals;
        settle();
    }
};
static std::vector<Barrier> barriers;  // what stands in shared memory says which

static Barrier& found(const u64* barrier) {
    if (*barrier >= barriers.size()) fail("a barrier is used before it is made");
    return barriers[*barrier];
}
static void mbarrier_init(u64* barrier, u32 arrivals) {
    *barrier = barriers.size();
    barriers.push_back({arrivals, arrivals});
}
static void mbarrier_arrive(u64* barrier, u32 count = 1) { found(barrier).arrive(count); }
static void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
    found(barrier).bytes += static_cast<int>(bytes);
    found(barrier).arrive(1);
}
static void mbarrier_wait(u64* barrier, u32 parity) {
    const Barrier& waited = found(barrier);
    wait_until([&] { return waited.phase != parity; });
}

static struct {
    u32 threads, meetings;
} named[2][8];  // by CTA

static u32 come_to(u32 id, u32 threads) {
    auto& barrier = named[cta][id];
    const u32 meeting = barrier.meetings;
    if (++barrier.threads == threads) barrier.threads = 0, ++barrier.meetings, ++progress;
    return meeting;
}
static void named_barrier_sync(u32 id, u32 threads) {
    const u32 meeting = come_to(id, threads);
    const auto& barrier = named[cta][id];
    wait_until([&] { return barrier.meetings != meeting; });
}
static void named_barrier_arrive(u32 id, u32 threads) { come_to(id, threads); }
static void __syncthreads();

// ---- copies by TMA -----------------------------------------------------------------------------------------------
struct Stamp {  // what a box holds, in each of its quarters; of a piece of a page in every eight rows
    int kind, x, y, z;
    bool operator==(const Stamp& o) const { return kind == o.kind && x == o.x && y == o.y && z == o.z; }
};
constexpr int kSpoiled = 0, kKeyValue = 1, kQuery = 2, kProbabilities = 3;

struct Landing {
    void* smem;
    const u64* barrier;
    u32 bytes, stamps;  // so many, evenly, of `boxes` boxes side by side, and then `rows` rows further
    int rows, boxes;
    Stamp stamp;
};
static std::vector<Landing> in_flight;

static Stamp& stamp_of(void* box, u32 bytes, u32 quarter) {
    return *reinterpret_cast<Stamp*>(static_cast<char*>(box) + bytes / 4 * quarter);
}

static void tma_load_3d(void* smem, const TensorMap* map, u64* barrier, int x, int y, int z);
static void tma_load_5d(void* smem, const TensorMap* map, u64* barrier, int x, int y, int z, int u, int v);

static void land_one(u32 newest_first) {  // percent
    const size_t which = chance(newest_first) ? in_flight.size() - 1 : below(static_cast<u32>(in_flight.size()));
    const Landing landing = in_flight[which];
    in_flight.erase(in_flight.begin() + static_cast<long>(which));
    for (u32 i = 0; i < landing.stamps; ++i) {
        Stamp stamp = landing.stamp;
        stamp.y += landing.rows * (static_cast<int>(i) / landing.boxes);
        stamp.x += static_cast<int>(i) % landing.boxes * 64;
        *reinterpret_cast<Stamp*>(static_cast<char*>(landing.smem) + landing.bytes / landing.stamps * i) = stamp;
    }
    Barrier& barrier = found(landing.barrier);
    barrier.bytes -= static_cast<int>(landing.bytes);
    barrier.settle();
}

// ---- copies by threads: seen when waited for, read from at some time before ------------------------------------------
struct Copy {
    void* smem;
    const void* from;
    uint4 read;
    bool early;
};
struct Copies {
    std::vector<Copy> all;
    std::vector<size_t> groups;  // where each that was committed ends
};
static Copies copies[512];  // by thread

static bool is_of_tiles(const void* smem);  // where copies go

static void copy_async(void* smem, const void* from) {
    if (reinterpret_cast<size_t>(smem) % 16 || reinterpret_cast<size_t>(from) % 16) fail("a copy is not aligned");
    if (!is_of_tiles(smem)) fail("a copy goes past the tiles");
    Copy copy{smem, from, {}, chance(50)};
    if (copy.early) std::memcpy(&copy.read, from, 16);
    std::memset(smem, 0xff, 16);
    copies[threadIdx.x].all.push_back(copy);
}
static void copy_async_commit() { copies[threadIdx.x].groups.push_back(copies[threadIdx.x].all.size()); }
template <int kPending>
static void copy_async_wait() {
    dawdle();
    auto& [all, groups] = copies[threadIdx.x];
    if (groups.size() <= kPending) return;
    const size_t complete = groups.size() - kPending, end = groups[complete - 1];
    for (size_t i = 0; i < end; ++i) std::memcpy(all[i].smem, all[i].early ? &all[i].read : all[i].from, 16);
    all.erase(all.begin(), all.begin() + static_cast<long>(end));
    groups.erase(groups.begin(), groups.begin() + static_cast<long>(complete));
    for (size_t& group : groups) group -= end;
}

// ---- global memory -----------------------------------------------------------------------------------------------
static u32 load_acquire(const u32* pointer) {
    pause_fiber();
    return *pointer;
}
static u32 atomic_add_relaxed(u32* pointer, u32 value) {
    const u32 old = *pointer;
    *pointer += value;
    ++progress;
    return old;
}
static void red_add_release(u32* pointer, u32 value);  // a part is announced: rings.cpp looks at it
