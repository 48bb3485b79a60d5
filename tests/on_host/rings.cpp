// Runs cuda/producer.cuh on the CPU: the real producer warp against consumers that keep the kernels' protocol, with
// mbarriers and TMA that behave as the hardware's do at their worst: boxes land late and out of order, anybody may lag.
// usage: rings SLOTS SEED CASES; says "ok" or what went wrong.
#include <map>
#include <random>

#include "warp.h"

// ptx.cuh's own are asm: set them aside, and give the same names a meaning here.
#define mbarrier_init ptx_mbarrier_init
#define mbarrier_arrive ptx_mbarrier_arrive
#define mbarrier_arrive_expect_tx ptx_mbarrier_arrive_expect_tx
#define mbarrier_wait ptx_mbarrier_wait
#define tma_load_3d ptx_tma_load_3d
#define launder ptx_launder
#include "ptx.cuh"
#undef mbarrier_init
#undef mbarrier_arrive
#undef mbarrier_arrive_expect_tx
#undef mbarrier_wait
#undef tma_load_3d
#undef launder

static std::mt19937 generator;
static bool chance(int percent) { return static_cast<int>(generator() % 100) < percent; }

static void fail(const char* what) {
    std::puts(what);
    std::exit(1);
}

struct Barrier {
    u32 count, pending, phase = 0;
    int bytes = 0;

    void settle() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
    }
    void arrive() {
        if (pending == 0) fail("an arrival too many in a phase: the hardware raises an illegal instruction");
        --pending;
        settle();
    }
};
static std::map<const u64*, Barrier> barriers;

struct Landing {
    void* smem;
    const u64* barrier;
    int column, page;
};
static std::vector<Landing> in_flight;

static int launder(int value) { return value; }
static void mbarrier_init(u64* barrier, u32 arrivals) { barriers[barrier] = {arrivals, arrivals}; }
static void mbarrier_arrive(u64* barrier) { barriers.at(barrier).arrive(); }
static void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
    barriers.at(barrier).bytes += static_cast<int>(bytes);
    barriers.at(barrier).arrive();
}
static void mbarrier_wait(u64* barrier, u32 parity) {
    while (barriers.at(barrier).phase == parity) pause_fiber();
}
static void tma_load_3d(void* smem, const TensorMap*, u64* barrier, int x, int, int z) {
    in_flight.push_back({smem, barrier, x, z});
}

#include "producer.cuh"

constexpr int kSlots = MLA_SLOTS;
static DecodeParams params;
static BoxRing<kSlots> rings[2];
static ItemQueue queue;
static int item_arrivals;  // consumer warps at an item's end (the kernels' join)

static int page_of(int request, int tile) { return request * 1000 + tile; }

static void land_one(int newest_first) {  // percent
    const size_t which = chance(newest_first) ? in_flight.size() - 1 : generator() % in_flight.size();
    const Landing landing = in_flight[which];
    in_flight.erase(in_flight.begin() + static_cast<long>(which));
    static_cast<int*>(landing.smem)[0] = landing.page;
    static_cast<int*>(landing.smem)[1] = landing.column;
    Barrier& barrier = barriers.at(landing.barrier);
    barrier.bytes -= kBoxBytes;
    barrier.settle();
}

static void expect(const u16* box, int request, int tile, int c) {
    const int* found = reinterpret_cast<const int*>(box);
    if (found[0] != page_of(request, tile) || found[1] != c * kBoxColumns) fail("a consumer read another box's data");
}

// decode_swapped.cu: warpgroup w takes the tiles of ring w; slots follow from the tile's first place.
static void swapped_tile(const WorkItem& w, int tile, u32 ordinal) {
    BoxRing<kSlots>& ring = rings[ordinal & 1];
    const RingPlace first = ring_place<kSlots>(ordinal, 0);
    const auto slot_of = [&](int c) { return first.slot + c < kSlots ? first.slot + c : first.slot + c - kSlots; };
    for (int c = 0; c < kBoxes; ++c) mbarrier_wait(&ring.full[slot_of(c)], first.phase ^ (slot_of(c) < first.slot));
    for (int c = kBoxes - 1; c >= 0; --c) {
        while (chance(30)) pause_fiber();
        expect(ring.box[slot_of(c)], w.request, tile, c);
        mbarrier_arrive(&ring.empty[slot_of(c)]);
    }
}

static void consumer_main(int warpgroup) {
    for (u32 index = 0;; ++index) {
        const WorkItem& w = queue.wait(index);
        if (w.request < 0) return;
        const int begin = w.begin, end = w.end, before = w.tiles_before;
        for (int tile = begin; tile < end; ++tile) {
            const u32 ordinal = before + tile - begin;
            if (static_cast<int>(ordinal & 1) == warpgroup) swapped_tile(w, tile, ordinal);
        }
        const int all = ++item_arrivals + 7 - (item_arrivals - 1) % 8;  // the eight of this item
        while (item_arrivals < all) pause_fiber();
        mbarrier_arrive(&queue.empty[index % ItemQueue::kSlots]);
    }
}

static void query_main() {  // fetch_queries() of query.cuh, as far as the queue knows
    for (u32 index = 0; queue.wait(index).request >= 0; ++index) mbarrier_arrive(&queue.empty[index % ItemQueue::kSlots]);
}

int main(int, char** arguments) {
    generator.seed(static_cast<u32>(std::atoi(arguments[1])));
    std::vector<Fiber> fibers(41);
    for (int round = std::atoi(arguments[2]); round > 0; --round) {
        const int b = 1 + static_cast<int>(generator() % 6), max_pages = 12;
        std::vector<int> lengths(b), table(b * max_pages);
        for (int i = 0; i < b; ++i) {
            lengths[i] = static_cast<int>(generator() % (max_pages * kPageTokens + 1));
            for (int k = 0; k < max_pages; ++k) table[i * max_pages + k] = page_of(i, k);
        }
        params.b = b;
        params.cache_seqlens = lengths.data();
        params.block_table = table.data();
        params.max_pages = params.table_stride = max_pages;
        params.num_pages = 1 << 20;
        params.row_blocks = params.group = params.row_groups = 1;
        gridDim.x = 1 + generator() % 3;
        blockIdx.x = generator() % gridDim.x;
        barriers.clear();
        in_flight.clear();
        item_arrivals = 0;
        std::fill(meeting_arrivals, meeting_arrivals + 4, 0);
        for (BoxRing<kSlots>& ring : rings) ring.init_barriers();
        queue.init_barriers();
        for (int i = 0; i < 32; ++i) start(fibers[i], 256 + i, [] { produce(params, rings, queue); });
        for (int i = 0; i < 8; ++i) start(fibers[32 + i], i * 32, [i] { consumer_main(i / 4); });
        start(fibers[40], 288, query_main);
        const int lag = static_cast<int>(generator() % fibers.size());  // a warp that hardly gets to run
        const int landing = 1 + static_cast<int>(generator() % 15), newest_first = static_cast<int>(generator() % 100);
        long idle = 0;
        while (std::any_of(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return !fiber.finished; })) {
            if (++idle > 20'000'000) fail("nothing moves: a deadlock");
            if (!in_flight.empty() && chance(landing)) land_one(newest_first);
            const int next = static_cast<int>(generator() % fibers.size());
            if ((next == lag && !chance(5)) || fibers[next].finished) continue;
            run(fibers[next]);
        }
        if (!in_flight.empty()) fail("a load was never waited for");
    }
    std::puts("ok");
}
