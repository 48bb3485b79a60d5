// Prefill: what a tile is, where it lies in shared memory, and how WGMMA finds it there.
#pragma once
#include "ptx.cuh"

constexpr int kHeadDim = MLA_HEAD_DIM, kHeadDimV = MLA_HEAD_DIM_V;  // of q and k; of v and out
constexpr int kConsumers = MLA_CONSUMERS;                           // warpgroups, 64 query rows each
constexpr int kKeys = MLA_KEYS;                                     // of a tile
constexpr int kStages = MLA_STAGES;                                 // tiles of K, and of V, in flight
constexpr int kQueries = MLA_QUERIES;                               // items whose queries shared memory holds
constexpr int kWarpgroup = 128, kWarpgroupRows = 64;
constexpr int kRows = kConsumers * kWarpgroupRows;  // of queries, a CTA's
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr bool kTurns = MLA_TURNS;                  // consumers take turns in issuing WGMMA
constexpr bool kCompares = MLA_COMPARES;            // every score with its row's reference (prefill_softmax.cuh)
static_assert(kQueries == 1 || kQueries == 2, "Producer::load_queries counts uses modulo four");
static_assert(kConsumers == 2 || kConsumers == 3, "turns are taken by two or three");
static_assert(kKeys % 16 == 0 && kKeys <= 256, "TMA boxes have up to 256 rows, PV takes 16 keys a step");

// A box is 64 columns of a tile: rows of 128 bytes, 128-byte swizzle, eight rows an atom; one TMA instruction.
constexpr int kBoxColumns = 64, kBoxRowBytes = 128;
constexpr int kBoxes = kHeadDim / kBoxColumns, kBoxesV = kHeadDimV / kBoxColumns;
constexpr u32 kQueryBoxBytes = kWarpgroupRows * kBoxRowBytes, kKeyBoxBytes = kKeys * kBoxRowBytes;
constexpr int kStepK = 16, kStepsPerBox = kBoxColumns / kStepK;

// Lower words of matrix descriptors (upper: ptx.cuh). Rows x 64 columns, the contraction runs along the row: Q, K.
__device__ __forceinline__ u32 descriptor_along_row(const void* smem) { return 1u << 16 | (smem_address(smem) & 0x3FFFF) >> 4; }
// Keys x 64 columns, the contraction runs down the rows, boxes side by side: V.
__device__ __forceinline__ u32 descriptor_down_rows(const void* smem) {
    return (kKeyBoxBytes >> 4) << 16 | (smem_address(smem) & 0x3FFFF) >> 4;
}
constexpr u32 kAdvanceAlongRow = kStepK * 2 >> 4, kAdvanceDownRows = kStepK * kBoxRowBytes >> 4;

// A slot of a ring and the parity of its use.
template <int kSlots>
struct Place {
    u32 slot = 0, phase = 0;
    __device__ void next() {
        if (++slot == kSlots) slot = 0, phase ^= 1;
    }
};

// Tiles of K, or of V, on their way from the producer to all consumers.
template <int kTileBoxes>
struct TileRing {
    static constexpr u32 kBytes = kTileBoxes * kKeyBoxBytes;
    struct Barriers {
        u64 full[kStages], empty[kStages];
        __device__ void init() {
            for (int i = 0; i < kStages; ++i) mbarrier_init(&full[i], 1), mbarrier_init(&empty[i], kConsumers * kWarpgroup / 32);
        }
    };
    u16 box[kStages][kTileBoxes][kKeys * kBoxColumns];
};

// Named barriers (0 is __syncthreads): whose turn it is to issue WGMMA, one a consumer.
constexpr u32 kBarrierTurn = 1;
constexpr u32 kBarrierMeet = kBarrierTurn + kConsumers;  // the warps of a consumer, one each
