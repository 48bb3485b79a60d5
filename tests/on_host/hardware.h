// What ptx.cuh does with one instruction each, on the CPU and at its worst: copies land late and out of order, and spoil the
// place they go to from the start; other CTAs are slow.
#pragma once
#include <cstring>
#include <map>
#include <random>

#include "warp.h"

// ptx.cuh's own are asm: set them aside, and give the same names a meaning here.
#define mbarrier_init ptx_mbarrier_init
#define mbarrier_arrive ptx_mbarrier_arrive
#define mbarrier_arrive_expect_tx ptx_mbarrier_arrive_expect_tx
#define mbarrier_wait ptx_mbarrier_wait
#define named_barrier_sync ptx_named_barrier_sync
#define tma_load_3d ptx_tma_load_3d
#define bulk_load ptx_bulk_load
#define fence_proxy_async ptx_fence_proxy_async
#define fence_proxy_async_global ptx_fence_proxy_async_global
#define load_shared ptx_load_shared
#define load_acquire ptx_load_acquire
#define atomic_add_acq_rel ptx_atomic_add_acq_rel
#define atomic_add_relaxed ptx_atomic_add_relaxed
#define exp2_approx ptx_exp2_approx
#define pack_elements ptx_pack_elements
#define launder ptx_launder
#include "ptx.cuh"
#undef mbarrier_init
#undef mbarrier_arrive
#undef mbarrier_arrive_expect_tx
#undef mbarrier_wait
#undef named_barrier_sync
#undef tma_load_3d
#undef bulk_load
#undef fence_proxy_async
#undef fence_proxy_async_global
#undef load_shared
#undef load_acquire
#undef atomic_add_acq_rel
#undef atomic_add_relaxed
#undef exp2_approx
#undef pack_elements
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
static void fence_proxy_async() {}
static void fence_proxy_async_global() {}
static float4 load_shared(const float4* pointer) { return *pointer; }
static float exp2_approx(float x) { return std::exp2(x); }
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
static std::map<const u64*, Barrier> barriers;

static void mbarrier_init(u64* barrier, u32 arrivals) { barriers[barrier] = {arrivals, arrivals}; }
static void mbarrier_arrive(u64* barrier, u32 count = 1) { barriers.at(barrier).arrive(count); }
static void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
    barriers.at(barrier).bytes += static_cast<int>(bytes);
    barriers.at(barrier).arrive(1);
}
static void mbarrier_wait(u64* barrier, u32 parity) {
    const Barrier& found = barriers.at(barrier);
    while (found.phase == parity) pause_fiber();
}

static struct {
    u32 threads, meetings;
} named[3];

static void named_barrier_sync(u32 id, u32 threads) {  // by fibers that stand for their warps
    auto& barrier = named[id];
    const u32 meeting = barrier.meetings;
    barrier.threads += 32;
    if (barrier.threads == threads) barrier.threads = 0, ++barrier.meetings, ++progress;
    while (barrier.meetings == meeting) pause_fiber();
}

// ---- copies ------------------------------------------------------------------------------------------------------
struct Stamp {  // what a box holds, in each of its quarters
    int kind, x, y, z;
    bool operator==(const Stamp& o) const { return kind == o.kind && x == o.x && y == o.y && z == o.z; }
};
constexpr int kSpoiled = 0, kKeyValue = 1, kQuery = 2, kProbabilities = 3;

struct Landing {
    char* smem;
    const u64* barrier;
    u32 bytes;
    Stamp stamp;
    const void* from;        // instead of a stamp
    std::vector<char> seen;  // of it, if the copy read early
};
static std::vector<Landing> in_flight;

static Stamp& stamp_of(void* box, u32 bytes, u32 quarter) {
    return *reinterpret_cast<Stamp*>(static_cast<char*>(box) + bytes / 4 * quarter);
}

static void tma_load_3d(void* smem, const TensorMap* map, u64* barrier, int x, int y, int z);

static void bulk_load(void* smem, const void* from, u32 bytes, u64* barrier) {
    Landing landing{static_cast<char*>(smem), barrier, bytes, {}, from, {}};
    const char* source = static_cast<const char*>(from);
    if (chance(50)) landing.seen.assign(source, source + bytes);
    std::memset(smem, 0xff, bytes);
    in_flight.push_back(std::move(landing));
}

static void land_one(u32 newest_first) {  // percent
    const size_t which = chance(newest_first) ? in_flight.size() - 1 : below(static_cast<u32>(in_flight.size()));
    const Landing landing = std::move(in_flight[which]);
    in_flight.erase(in_flight.begin() + static_cast<long>(which));
    if (landing.from) std::memcpy(landing.smem, landing.seen.empty() ? landing.from : landing.seen.data(), landing.bytes);
    else for (u32 i = 0; i < 4; ++i) stamp_of(landing.smem, landing.bytes, i) = landing.stamp;
    Barrier& barrier = barriers.at(landing.barrier);
    barrier.bytes -= static_cast<int>(landing.bytes);
    barrier.settle();
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
static u32 atomic_add_acq_rel(u32* pointer, u32 value);  // a part is announced: rings.cpp looks at it
