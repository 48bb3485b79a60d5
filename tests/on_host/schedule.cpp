// Runs cuda/schedule.cuh, the code that every CTA runs on the GPU, on the CPU. Reads cases from standard input, writes
// the work items of every CTA. With an argument: tries `divide` instead, and says "ok" or where it is wrong.
#include "warp.h"
//
#include <random>

#include "schedule.cuh"

static DecodeParams params;
WorkItem item;  // in shared memory, as the queue's are

// Every lane must come to the same, whatever it is told.
static void agree(int value) {
    const int* values = meet(value);
    if (std::any_of(values, values + 32, [&](int other) { return other != value; })) std::puts("lanes disagree"), std::exit(1);
}

// Of the CTA, or of the pair of CTAs that have one share.
static u32 number() { return blockIdx.y * grid_blocks() + grid_block(); }

static void lane_main() {
    const bool writes = (threadIdx.x & 31) == 0;
    WorkRange range(params);
    for (bool more = true; more;) {
        more = range.next(item);
        agree(more);
        const WorkItem w = item;
        __syncwarp();  // who goes on writes the next
        if (more && writes) {
            std::printf("%u", number());
            for (int field : {w.request, w.kv_len, w.tiles, w.row_block, w.begin, w.end, static_cast<int>(w.ordinal), w.first_cta,
                              w.part, w.parts, w.slices, static_cast<int>(w.invalid)})
                std::printf(" %d", field);
            std::puts("");
        }
        if (!more && writes && w.request < 0) std::printf("%u end\n", number());
    }
}

static void try_to_divide(int a, int b) {
    if (divide(a, b) == a / b) return;
    std::printf("%d / %d is not %d\n", a, b, divide(a, b));
    std::exit(1);
}
static int try_divisions() {
    constexpr int kEnd = 1 << 20;
    for (int a = 0; a < 2048; ++a)
        for (int b = 1; b < 2048; ++b) try_to_divide(a, b);
    std::mt19937 random(1);
    for (int b = 1; b < kEnd; ++b)
        for (int i = 0; i < 4; ++i) {  // where the quotient is exact, and around it
            const int a = static_cast<int>(random() % (kEnd / b + 1)) * b;
            for (int near : {a - 1, a, a + 1, a + b - 1})
                if (near >= 0 && near < kEnd) try_to_divide(near, b);
        }
    for (int i = 0; i < kEnd; ++i) {  // longer lines than there is memory for
        const int b = 1 + static_cast<int>(random() % 32768), a = static_cast<int>(random() % 32768) * b;
        for (int near : {max(a - 1, 0), a, a + b - 1}) try_to_divide(near, b);
    }
    std::puts("ok");
    return 0;
}

int main(int count, char**) {
    if (count > 1) return try_divisions();
    Warp warp{};
    std::vector<int> lengths;
    while (std::scanf("%d %u %u %d %d %d %d %d", &params.b, &gridDim.x, &gridDim.y, &params.row_blocks, &params.row_groups,
                      &params.max_pages, &params.items_each, &params.item_parts) == 8) {
        gridDim.x *= kClusterCtas;
        lengths.resize(params.b);
        for (int& length : lengths)
            if (std::scanf("%d", &length) != 1) return 1;
        params.cache_seqlens = lengths.data();
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = blockIdx.y % kClusterCtas; blockIdx.x < gridDim.x; blockIdx.x += kClusterCtas) {  // either of a pair
                start(warp, 384, lane_main);
                run_alone(warp);
            }
        std::puts("done");
        std::fflush(stdout);
    }
}
