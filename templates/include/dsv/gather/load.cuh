#pragma once
// Brings the tokens of listed units into a gathered tile (dsv/gather/tile.cuh).
//
// Units of 8 tokens or more come by the copy engine, 8 tokens and all columns a copy, each lane of one warp issuing its
// own: one thread alone would keep it half idle. Single tokens are too short for it and come by cp.async, eight lanes to
// the 128 bytes of a row's slab, which fall on eight different 16-byte columns of shared memory.
//
// cp.async writes through the generic proxy, wgmma reads through the async one: whoever has waited for a tile of tokens
// must fence (see `acquire`) before its products. The fence stands with the consumers so that producers need not wait for
// their own copies, and run as far ahead as there are stages.
#include "dsv/gather/tile.cuh"
#include "dsv/gather/walk.cuh"
#include "dsv/mbarrier.cuh"
#include "dsv/tma.cuh"
#include "dsv/types.cuh"

namespace dsv {

// 16 bytes, or 16 zeros; the address must be readable either way.
__device__ __forceinline__ void copy_16_async(uint32 smem, const void* global, bool exists) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(exists ? 16 : 0)
                 : "memory");
}

// One of the barrier's expected arrivals, once every earlier cp.async of this thread has landed.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint64* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// K or V of one head, both ways: by copy engine (box of 8 tokens) and by address.
struct GatherSource {
    const TensorMap* map;
    const TensorView* view;
};

template <class Element, int head_dim, int query_group, int kv_block, int block_n>
struct Gather {
    using Walk = GatherWalk<query_group, kv_block, block_n>;
    using Tile = GatheredTile<head_dim>;
    static constexpr bool kByToken = kv_block == 1;
    static constexpr int kThreads = kByToken ? 128 : 32;  // of the producer
    static constexpr int kArrivals = kByToken ? 128 : 1;  // that complete a tile, beside its bytes
    static constexpr int kBoxes = block_n / 8;
    static constexpr int kWarpRows = block_n / 4;  // tokens a warp brings
    static_assert(kByToken || (kv_block % 8 == 0 && kBoxes <= 32), "a copy of 8 tokens a lane");
    static_assert(!kByToken || (kWarpRows % 8 == 0 && kWarpRows <= 32), "a token a lane, groups of 8 within a warp");

    // What this thread has to know of the t-th tile: the first token of its copy, or one token's id. Tokens past the
    // list and past the sequence become zeros.
    static __device__ __forceinline__ int fetch(const Walk& walk, int t, int seqlen_kv) {
        const int lane = threadIdx.x % 32;
        if constexpr (kByToken) {
            return walk.unit_start(walk.first_place(t) + threadIdx.x / 32 % 4 * kWarpRows + lane % kWarpRows, -1);
        } else {
            return walk.unit_start(walk.first_place(t) + lane * 8 / kv_block, seqlen_kv) + lane * 8 % kv_block;
        }
    }

    // All kThreads, with what they fetched.
    static __device__ __forceinline__ void load(uint8* tile, const GatherSource& from, uint64* barrier, int fetched,
                                                int kv_head, int batch) {
        const int lane = threadIdx.x % 32;
        if constexpr (kByToken) {
            const int warp = threadIdx.x / 32 % 4;
            const Element* head = from.view->at<Element>(batch, 0, kv_head) + lane % 8 * 8;
            const int64 stride = from.view->stride_seq;
            const uint32 to = smem_address(tile) + warp * (kWarpRows / 8) * Tile::kGroup;
#pragma unroll
            for (int pass = 0; pass < kWarpRows / 4; ++pass) {
                const int row = 4 * pass + lane / 8;
                const int token = __shfl_sync(0xFFFFFFFF, fetched, row);
                const Element* source = head + (token < 0 ? 0 : token) * stride;
                const uint32 target = to + row / 8 * Tile::kGroup + row % 8 * kRowBytes + ((lane % 8 ^ row % 8) << 4);
#pragma unroll
                for (int slab = 0; slab < slabs(head_dim); ++slab) {
                    // Products do not read past head_dim.
                    if (slab * kSlabColumns + lane % 8 * 8 < head_dim) {
                        copy_16_async(target + slab * Tile::kSlab, source + slab * kSlabColumns, token >= 0);
                    }
                }
            }
            mbarrier_arrive_after_copies(barrier);
        } else {
            if (lane == 0) mbarrier_arrive_expect(barrier, tile_bytes(block_n, head_dim));
            if (lane < kBoxes) {
                tma_load_tile<head_dim, 8>(tile + lane * Tile::kGroup, from.map, barrier, fetched, kv_head, batch);
            }
            __syncwarp();
        }
    }

    // Waits for a tile, so that products may read it.
    static __device__ __forceinline__ void acquire(uint64* barrier, uint32 phase) {
        mbarrier_wait(barrier, phase);
        if constexpr (kByToken) fence_async_proxy();
    }
};

}  // namespace dsv
