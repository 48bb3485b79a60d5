// What kernel headers need to compile and run on the CPU: threads as fibers, warp intrinsics as meetings of 32 of them.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
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
inline int __ffs(unsigned mask) { return __builtin_ffs(static_cast<int>(mask)); }

inline Index threadIdx, blockIdx, gridDim;

// ---- fibers: each runs until it pauses; whoever drives them decides who is next ----------------------------------
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    std::function<void()> body;
    unsigned thread;  // threadIdx.x
    int meetings = 0;
    bool finished = false;
};
inline ucontext_t driver;
inline Fiber* running;

inline void pause_fiber() { swapcontext(&running->context, &driver); }

inline void fiber_main() {
    running->body();
    running->finished = true;
    pause_fiber();
}

inline void start(Fiber& fiber, unsigned thread, std::function<void()> body) {
    fiber.thread = thread;
    fiber.body = std::move(body);
    fiber.meetings = 0;
    fiber.finished = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, fiber_main, 0);
}

inline void run(Fiber& fiber) {
    running = &fiber;
    threadIdx.x = fiber.thread;
    swapcontext(&driver, &fiber.context);
}

// ---- one warp: every lane leaves a value, and goes on when all have ----------------------------------------------
inline int meeting_values[4][32], meeting_arrivals[4];

inline const int* meet(int value) {
    const int slot = running->meetings++ & 3, lane = static_cast<int>(running->thread & 31);
    if (meeting_arrivals[slot] == 32) meeting_arrivals[slot] = 0;
    meeting_values[slot][lane] = value;
    ++meeting_arrivals[slot];
    meeting_arrivals[(slot + 2) & 3] = 0;  // everyone has left that one
    while (meeting_arrivals[slot] < 32) pause_fiber();
    return meeting_values[slot];
}
inline int __shfl_sync(unsigned, int value, int lane) { return meet(value)[lane & 31]; }
inline int __shfl_up_sync(unsigned, int value, int delta) {
    const int lane = static_cast<int>(running->thread & 31);
    const int* values = meet(value);
    return lane >= delta ? values[lane - delta] : value;
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
inline void __syncwarp() { meet(0); }
