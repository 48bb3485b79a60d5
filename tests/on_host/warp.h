// What kernel headers need to compile and run on the CPU: threads as fibers, warp intrinsics as meetings of 32 of them.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
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
template <class T>
struct Pair {
    T x, y;
};
template <class T>
struct Four {
    T x, y, z, w;
};
using uint2 = Pair<unsigned>;
using uint4 = Four<unsigned>;
using float2 = Pair<float>;
using float4 = Four<float>;
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline size_t __cvta_generic_to_shared(const void* pointer) { return reinterpret_cast<size_t>(pointer); }
inline int __ffs(unsigned mask) { return __builtin_ffs(static_cast<int>(mask)); }

inline Index threadIdx, blockIdx, gridDim;

// ---- fibers: each runs until it pauses; whoever drives them decides who is next ----------------------------------
// A fiber is a lane of a warp whose 32 lanes all run, or stands for its whole warp (`warp` is null): then it is lane 0, and
// what lanes exchange is its own.
struct Warp {
    int values[4][32], arrivals[4];  // of the last meetings
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    std::function<void()> body;
    Warp* warp;
    unsigned thread;  // threadIdx.x
    int meetings = 0;
    bool finished = false;
};
inline ucontext_t driver;
inline Fiber* running;
inline long progress;  // grows when something happens that a fiber may wait for

inline void pause_fiber() { swapcontext(&running->context, &driver); }

inline void fiber_main() {
    running->body();
    running->finished = true;
    ++progress;
    pause_fiber();
}

inline void start(Fiber& fiber, Warp* warp, unsigned thread, std::function<void()> body) {
    fiber.warp = warp;
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

// Lane by lane, what a fiber that stands for its warp does without waiting.
template <class Body>
void each_lane(Body body) {
    for (unsigned lane = 0; lane < 32; ++lane) threadIdx.x = running->thread + lane, body();
    threadIdx.x = running->thread;
}

// ---- one warp: every lane leaves a value, and goes on when all have ----------------------------------------------
inline const int* meet(int value) {
    Warp& warp = *running->warp;
    const int slot = running->meetings++ & 3, lane = static_cast<int>(running->thread & 31);
    if (warp.arrivals[slot] == 32) warp.arrivals[slot] = 0;
    warp.values[slot][lane] = value;
    warp.arrivals[(slot + 2) & 3] = 0;  // everyone has left that one
    if (++warp.arrivals[slot] == 32) ++progress;
    while (warp.arrivals[slot] < 32) pause_fiber();
    return warp.values[slot];
}
inline int __shfl_sync(unsigned, int value, int lane) { return running->warp ? meet(value)[lane & 31] : value; }
inline int __shfl_up_sync(unsigned, int value, int delta) {
    const int lane = static_cast<int>(running->thread & 31);
    const int* values = meet(value);
    return lane >= delta ? values[lane - delta] : value;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    if (!running->warp) return value;
    return __builtin_bit_cast(T, meet(__builtin_bit_cast(int, value))[(running->thread & 31) ^ static_cast<unsigned>(mask)]);
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
void __syncthreads();  // nobody calls it here
inline void __syncwarp() {
    if (running->warp) meet(0);
}
