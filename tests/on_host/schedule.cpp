// Runs cuda/schedule.cuh, the code that every CTA runs on the GPU, on the CPU. Reads cases from standard input, writes
// the work items of every CTA.
#include "warp.h"
//
#include "schedule.cuh"

static DecodeParams params;

// Every lane must come to the same, whatever it is told.
static void agree(int value) {
    const int* values = meet(value);
    if (std::any_of(values, values + 32, [&](int other) { return other != value; })) std::puts("lanes disagree");
}

static void lane_main() {
    const bool writes = (threadIdx.x & 31) == 0;
    WorkRange range(params);
    WorkItem w{};
    while (range.next(w)) {
        const int fields[] = {w.request, w.kv_len, w.tiles, w.row_block, w.begin, w.end, static_cast<int>(w.ordinal),
                              w.first_cta, w.part, w.parts, w.invalid};
        for (int field : fields) agree(field);
        if (!writes) continue;
        std::printf("%u", blockIdx.x);
        for (int field : fields) std::printf(" %d", field);
        std::puts("");
    }
    agree(w.request);
    if (writes && w.request < 0) std::printf("%u end\n", blockIdx.x);
}

int main() {
    std::vector<Fiber> lanes(32);
    Warp warp{};
    std::vector<int> lengths;
    int b, grid;
    while (std::scanf("%d %d %d %d %d %d", &b, &grid, &params.row_blocks, &params.group, &params.row_groups,
                      &params.max_pages) == 6) {
        lengths.resize(b);
        for (int& length : lengths)
            if (std::scanf("%d", &length) != 1) return 1;
        params.b = b;
        params.cache_seqlens = lengths.data();
        gridDim.x = grid;
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
            for (int i = 0; i < 32; ++i) start(lanes[i], &warp, 384 + i, lane_main);
            for (bool busy = true; busy;) {
                busy = false;
                for (Fiber& lane : lanes)
                    if (!lane.finished) run(lane), busy = true;
            }
        }
        std::puts("done");
        std::fflush(stdout);
    }
}
