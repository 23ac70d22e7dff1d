#pragma once
// The KV blocks of one of two neighbouring groups, in an order of which the beginning is the same for both: first the blocks
// that both list, then its own, each from the last to the first.
#include "dsv/attention.cuh"
#include "dsv/kv_walk.cuh"
#include "dsv/types.cuh"

namespace dsv {

// Blocks from here on count as a group's own, whoever lists them.
constexpr int kPairWindow = 2048;

// A bit for each block of the window.
struct BlockSet {
    uint32 words[kPairWindow / 32];

    __device__ __forceinline__ bool has(int block) const {
        return block < kPairWindow && (words[block / 32] >> block % 32 & 1) != 0;
    }
    __device__ __forceinline__ void add(int block) {
        if (block < kPairWindow) atomicOr(&words[block / 32], 1u << block % 32);
    }
};

// One warp's. `both` lies in shared memory; `mine` is needed until the constructor ends.
template <int query_group, int kv_block>
struct PairWalk {
    using List = KvWalk<query_group, kv_block, kv_block>;

    List own;
    const BlockSet& both;
    int shared = 0;  // tiles that both groups walk; they come first
    int tiles = 0;   // all
    int tail;        // the place of the last block of the sequence; -1 where it is not listed

    int word = kPairWindow / 32;  // of `both`; its blocks from here on are walked
    uint32 bits = 0;              // those left of this word
    int walked = 0;               // places of `own` that were looked at, from its end
    int start = 0;                // of these the last 32: a lane holds the first key of one
    unsigned left = 0;            // lanes whose block is still to be walked

    __device__ __forceinline__ PairWalk(const List& own, const List& other, BlockSet& mine, BlockSet& both)
        : own(own), both(both) {
        const int lane = lane_id();
#pragma unroll 1
        for (int i = lane; i < kPairWindow / 32; i += 32) mine.words[i] = both.words[i] = 0;
        __syncwarp();
#pragma unroll 1
        for (int place = lane; place < own.tiles; place += 32) mine.add(own.block_start(place) / kv_block);
        __syncwarp();
#pragma unroll 1
        for (int place = lane; place < other.tiles; place += 32) {
            const int block = other.block_start(place) / kv_block;
            if (mine.has(block)) both.add(block);
        }
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < kPairWindow / 32; i += 32) shared += __popc(both.words[i]);
#pragma unroll
        for (int step = 16; step > 0; step /= 2) shared += __shfl_xor_sync(0xFFFFFFFF, shared, step);
        // Counted and not subtracted: a list that names a block twice walks it once where both list it.
        tiles = shared;
#pragma unroll 1
        for (int first = 0; first < own.tiles; first += 32) tiles += __popc(of_own(first + lane));
        const int last = own.num_kv_blocks - 1;
        const bool ends_there = own.tiles > 0 && own.block_start(own.tiles - 1) == last * kv_block;
        tail = both.has(last) ? 0 : ends_there ? shared : -1;
    }

    // Lanes whose place holds a block of this group alone.
    __device__ __forceinline__ unsigned of_own(int place) {
        const bool exists = place >= 0 && place < own.tiles;
        start = exists ? own.block_start(place) : 0;
        return __ballot_sync(0xFFFFFFFF, exists && !both.has(start / kv_block));
    }

    // First key of the next tile. The whole warp asks, `tiles` times; the first `shared` answers are those of both groups.
    __device__ __forceinline__ int next(bool shared_one) {
        if (shared_one) {
            while (bits == 0) bits = both.words[--word];
            const int bit = 31 - __clz(bits);
            bits ^= 1u << bit;
            return (word * 32 + bit) * kv_block;
        }
        while (left == 0) {
            left = of_own(own.tiles - 1 - walked - lane_id());
            walked += 32;
        }
        const int lane = __ffs(left) - 1;
        left &= left - 1;
        return __shfl_sync(0xFFFFFFFF, start, lane);
    }
};

}  // namespace dsv
