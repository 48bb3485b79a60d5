// What kernel headers need to compile and run on the CPU: threads as fibers, warp intrinsics as meetings of 32 of them.
#pragma once
#undef _FORTIFY_SOURCE  // it takes a jump from stack to stack for an error
#include <setjmp.h>
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
    unsigned x, y;
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
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline size_t __cvta_generic_to_shared(const void* pointer) { return reinterpret_cast<size_t>(pointer); }
inline int __ffs(unsigned mask) { return __builtin_ffs(static_cast<int>(mask)); }

// Off by up to two units in the last place, as the hardware's may be; the same operands give the same.
inline float __fdividef(float a, float b) {
    const unsigned mixed = (__builtin_bit_cast(unsigned, a) * 2654435761u ^ __builtin_bit_cast(unsigned, b)) * 2246822519u;
    const unsigned error = (mixed >> 16) % 5;
    return a == 0.f ? 0.f : __builtin_bit_cast(float, __builtin_bit_cast(unsigned, a / b) + error - 2);
}

inline Index threadIdx, blockIdx, gridDim;
inline unsigned cta_threads = 1024, cta;  // of a CTA, and which of a cluster's runs

// ---- fibers: each is a thread, and runs until it pauses; whoever drives them decides who is next -----------------
struct Warp;
struct Fiber {
    ucontext_t context;
    jmp_buf paused;
    std::vector<char> stack = std::vector<char>(1 << 16);
    std::function<void()> body;
    Warp* warp;
    unsigned thread;  // threadIdx.x, and on through the cluster
    unsigned meetings = 0;
    bool begun = false, finished = true;
    bool (*holds)(const void* condition) = nullptr;  // what it waits for
    const void* condition = nullptr;
};
struct Warp {
    std::vector<Fiber> lanes = std::vector<Fiber>(32);
    int values[4][32], arrivals[4];  // of the last meetings
    int left = 0;                    // lanes that run
    long stuck = -1;                 // `progress` when none of them could go on
};
inline jmp_buf driver;
inline Fiber* running;
inline long progress;  // grows when something happens that a fiber may wait for

// (swapcontext would ask the kernel each time. noipa: others write memory meanwhile.)
[[gnu::noipa]] inline void pause_fiber() {
    if (_setjmp(running->paused) == 0) _longjmp(driver, 1);
}

template <class Condition>
void wait_until(const Condition& condition) {
    if (condition()) return;
    running->condition = &condition;
    running->holds = [](const void* c) { return (*static_cast<const Condition*>(c))(); };
    pause_fiber();
    running->holds = nullptr;
}

inline void fiber_main() {
    running->body();
    running->finished = true;
    --running->warp->left;
    ++progress;
    pause_fiber();
}

// 32 threads from `thread` on.
inline void start(Warp& warp, unsigned thread, const std::function<void()>& body) {
    std::fill(warp.arrivals, warp.arrivals + 4, 0);
    warp.left = 32, warp.stuck = -1;
    for (unsigned lane = 0; lane < 32; ++lane) {
        Fiber& fiber = warp.lanes[lane];
        fiber.warp = &warp;
        fiber.thread = thread + lane;
        fiber.body = body;
        fiber.meetings = 0;
        fiber.begun = fiber.finished = false;
        fiber.holds = nullptr;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size() - fiber.thread % 64 * 192;  // or all share a few cache lines
        makecontext(&fiber.context, fiber_main, 0);
    }
}

[[gnu::noipa]] inline bool run(Fiber& fiber) {  // false: it cannot go on
    if (fiber.finished || (fiber.holds && !fiber.holds(fiber.condition))) return false;
    running = &fiber;
    threadIdx.x = fiber.thread % cta_threads, cta = fiber.thread / cta_threads;
    if (_setjmp(driver) != 0) return true;
    if (fiber.begun) _longjmp(fiber.paused, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
    return true;
}

inline void run_alone(Warp& warp) {
    while (warp.left > 0) {
        bool ran = false;
        for (Fiber& lane : warp.lanes) ran |= run(lane);
        if (!ran) std::puts("lanes disagree"), std::exit(1);
    }
}

// ---- one warp: every lane leaves a value, and goes on when all have ----------------------------------------------
inline const int* meet(int value) {
    Warp& warp = *running->warp;
    const unsigned slot = running->meetings++ & 3;
    if (warp.arrivals[slot] == 32) warp.arrivals[slot] = 0;
    warp.values[slot][running->thread & 31] = value;
    warp.arrivals[(slot + 2) & 3] = 0;  // everyone has left that one
    if (++warp.arrivals[slot] == 32) ++progress;
    wait_until([&] { return warp.arrivals[slot] == 32; });
    return warp.values[slot];
}
inline int __shfl_sync(unsigned, int value, int lane) { return meet(value)[lane & 31]; }
inline int __shfl_up_sync(unsigned, int value, int delta) {
    const int lane = static_cast<int>(running->thread & 31);
    const int* values = meet(value);
    return lane >= delta ? values[lane - delta] : value;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return __builtin_bit_cast(T, meet(__builtin_bit_cast(int, value))[(running->thread & 31) ^ static_cast<unsigned>(mask)]);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
    const int* values = meet(vote);
    unsigned mask = 0;
    for (int i = 0; i < 32; ++i) mask |= static_cast<unsigned>(values[i] != 0) << i;
    return mask;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
    const int* values = meet(static_cast<int>(value));
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= static_cast<unsigned>(values[i]);
    return all;
}
inline int __reduce_min_sync(unsigned, int value) {
    const int* values = meet(value);
    return *std::min_element(values, values + 32);
}
inline int __reduce_max_sync(unsigned, int value) {
    const int* values = meet(value);
    return *std::max_element(values, values + 32);
}
inline int __reduce_add_sync(unsigned, int value) {
    const int* values = meet(value);
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += values[i];
    return sum;
}
inline void __syncwarp() { meet(0); }
