// Runs cuda/schedule.cuh, the code that every CTA runs on the GPU, on the CPU. Reads cases from standard input, writes
// the work items of every CTA.
#include "warp.h"
//
#include "schedule.cuh"

static DecodeParams params;

static void lane_main() {
    const bool writes = (threadIdx.x & 31) == 0;
    WorkRange range(params);
    WorkItem w;
    while (range.next(w))
        if (writes)
            std::printf("%u %u %d %d %d %d %d %d %d %d %d %d\n", blockIdx.x, w.index, w.request, w.kv_len, w.tiles,
                        w.row_block, w.begin, w.end, w.tiles_before, w.first_cta, w.parts, w.invalid);
    range.end_mark(w);
    if (writes) std::printf("%u %u end\n", blockIdx.x, w.index);
}

int main() {
    std::vector<Fiber> lanes(32);
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
            for (int i = 0; i < 32; ++i) start(lanes[i], 256 + i, lane_main);
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
