// Runs cuda/schedule.cuh, the code that every CTA runs on the GPU, on the CPU: the 32 lanes of a warp are fibers that
// meet in each warp intrinsic. Reads cases from standard input, writes the work items of every CTA.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#define __device__
#define __forceinline__ inline
using std::max;
using std::min;

struct Index {
    unsigned x;
};
struct uint4 {
    unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline size_t __cvta_generic_to_shared(const void* pointer) { return reinterpret_cast<size_t>(pointer); }

static Index threadIdx, blockIdx, gridDim;

// ---- a warp of fibers --------------------------------------------------------------------------------------------
static ucontext_t scheduler, lanes[32];
static int current, exchange[2][32], meetings[32];
static bool finished[32];

static const int* meet(int value) {  // every lane leaves a value, then reads those of all
    int* values = exchange[meetings[current]++ & 1];
    values[current] = value;
    const int self = current;
    swapcontext(&lanes[self], &scheduler);
    return values;
}
inline int __shfl_sync(unsigned, int value, int lane) { return meet(value)[lane & 31]; }
inline int __shfl_up_sync(unsigned, int value, int delta) {
    const int self = current;
    const int* values = meet(value);
    return self >= delta ? values[self - delta] : value;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    const int* values = meet(vote);
    unsigned mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<unsigned>(values[i] != 0) << i;
    return mask;
}
inline int __reduce_add_sync(unsigned, int value) {
    const int* values = meet(value);
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += values[i];
    return sum;
}
inline int __ffs(unsigned mask) { return __builtin_ffs(static_cast<int>(mask)); }

#include "schedule.cuh"

static DecodeParams params;

static void lane_main() {
    WorkRange range(params);
    WorkItem w;
    while (range.next(w))
        if (current == 0)
            std::printf("%u %u %d %d %d %d %d %d %d %d %d %d\n", blockIdx.x, w.index, w.request, w.kv_len, w.tiles,
                        w.row_block, w.begin, w.end, w.tiles_before, w.first_cta, w.parts, w.invalid);
    range.end_mark(w);
    if (current == 0) std::printf("%u %u end\n", blockIdx.x, w.index);
    finished[current] = true;
    swapcontext(&lanes[current], &scheduler);
}

int main() {
    static std::vector<char> stacks(32 << 16);
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
            for (int i = 0; i < 32; ++i) {
                getcontext(&lanes[i]);
                lanes[i].uc_stack.ss_sp = &stacks[i << 16];
                lanes[i].uc_stack.ss_size = 1 << 16;
                meetings[i] = 0;
                finished[i] = false;
                makecontext(&lanes[i], lane_main, 0);
            }
            while (!finished[31])
                for (current = 0; current < 32; ++current) {
                    threadIdx.x = 256 + current;  // the producer warp
                    if (!finished[current]) swapcontext(&scheduler, &lanes[current]);
                }
        }
        std::puts("done");
        std::fflush(stdout);
    }
}
