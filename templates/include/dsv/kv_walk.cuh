#pragma once
// The KV tiles one query tile sees, walked from the last listed block to the first, so that only the first block
// taken can reach past the sequence.
#include "dsv/attention.cuh"
#include "dsv/types.cuh"

namespace dsv {

// kv_block 0: dense, every tile of block_n keys. A tile is a block, a part of one, or several blocks that are neighbours in
// the list.
template <int query_group, int kv_block, int block_n>
struct KvWalk {
    static constexpr bool kDense = kv_block == 0;
    static constexpr int kTilesPerBlock = kDense || block_n > kv_block ? 1 : kv_block / block_n;
    static constexpr int kBlocksPerTile = kDense || block_n < kv_block ? 1 : block_n / kv_block;
    static constexpr int kGroupRows = kDense ? 1 : query_group;

    const int32* index = nullptr;  // this group's list; unused when dense
    int32* error_flag = nullptr;
    int tiles = 0;  // to walk
    int num_kv_blocks = 0;
    int blocks = 0;      // listed
    int prefetched = 0;  // lane i holds the start of the i-th of the next 32 blocks

    KvWalk() = default;
    __device__ __forceinline__ KvWalk(const int32* q2k_index, const int32* q2k_count, int32* flag, const AttnSizes& sizes,
                                      int first_row, int head, int batch)
        : error_flag(flag), num_kv_blocks(sizes.num_kv_blocks) {
        if constexpr (kDense) {
            tiles = (sizes.seqlen_kv + block_n - 1) / block_n;
        } else {
            const int64 row = (int64{batch} * sizes.num_heads + head) * sizes.num_groups + first_row / kGroupRows;
            index = q2k_index + row * sizes.max_selected;
            int count = q2k_count[row];
            if (static_cast<unsigned>(count) > static_cast<unsigned>(sizes.max_selected)) {
                atomicOr(error_flag, kCountOutOfRange);
                count = count < 0 ? 0 : sizes.max_selected;
            }
            blocks = count;
            tiles = (count + kBlocksPerTile - 1) / kBlocksPerTile * kTilesPerBlock;
        }
    }

    // First key of the block at a place of the list; an id out of range is clamped and reported.
    __device__ __forceinline__ int block_start(int place) const {
        int block = index[place];
        if (static_cast<unsigned>(block) >= static_cast<unsigned>(num_kv_blocks)) {
            atomicOr(error_flag, kIndexOutOfRange);
            block = num_kv_blocks - 1;
        }
        return block * kv_block;
    }

    // First key of the t-th tile walked, or of its `part`-th block where it is several. The whole warp asks, for t = 0, 1,
    // 2, ...
    __device__ __forceinline__ int tile_start(int t, int part = 0) {
        if constexpr (kDense) {
            return (tiles - 1 - t) * block_n;
        } else if constexpr (kBlocksPerTile > 1) {
            const int first = t * kBlocksPerTile;
            const int last = blocks - 1;
            if (part == 0 && first % 32 == 0) {
                const int lane = threadIdx.x % 32;
                prefetched = first + lane <= last ? block_start(last - first - lane) : 0;
            }
            // Where the last tile walked lacks blocks, one that it has stands in their place: masked, but finite.
            const int present = min(kBlocksPerTile, blocks - first);
            return __shfl_sync(0xFFFFFFFF, prefetched, (first + max(present - 1 - part, 0)) % 32);
        } else {
            const int walked = t / kTilesPerBlock;
            const int last = tiles / kTilesPerBlock - 1;
            if (t % (32 * kTilesPerBlock) == 0) {
                const int lane = threadIdx.x % 32;
                prefetched = walked + lane <= last ? block_start(last - walked - lane) : 0;
            }
            return __shfl_sync(0xFFFFFFFF, prefetched, walked % 32) + (kTilesPerBlock - 1 - t % kTilesPerBlock) * block_n;
        }
    }

    // Keys of the first tile walked that exist; may be negative where a block is several tiles. Each further tile has
    // block_n more.
    __device__ __forceinline__ int valid_in_first(int seqlen_kv) const {
        if constexpr (kDense) {
            return seqlen_kv - block_n * (tiles - 1);
        } else if constexpr (kBlocksPerTile > 1) {
            const int present = min(kBlocksPerTile, blocks);
            return (present - 1) * kv_block + min(kv_block, seqlen_kv - block_start(blocks - 1));
        } else {
            return seqlen_kv - block_start(tiles / kTilesPerBlock - 1) - (kTilesPerBlock - 1) * block_n;
        }
    }

    // Keys that the last tile walked has, where a tile is several blocks.
    __device__ __forceinline__ int valid_in_last() const {
        return (blocks - (tiles - 1) * kBlocksPerTile) * kv_block;
    }
};

// Sets the accumulators of keys at and past `valid` in a tile of N keys.
template <int N>
__device__ __forceinline__ void mask_tail(float (&s)[N / 2], int valid, float value) {
    const int column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (8 * j + column + i % 2 >= valid) s[4 * j + i] = value;
        }
    }
}

}  // namespace dsv
