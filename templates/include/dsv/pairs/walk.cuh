#pragma once
// The KV blocks of one of two neighbouring groups, in an order of which the beginning is the same for both: first the blocks
// that both list, then those of its own, each from the last to the first.
#include "dsv/attention.cuh"
#include "dsv/kv_walk.cuh"
#include "dsv/types.cuh"

namespace dsv {

// Blocks from here on count as a group's own, whoever lists them, and come last.
constexpr int kPairWindow = 2048;
constexpr int kPairWords = kPairWindow / 32;

// A bit for each block of the window that this group alone lists, and behind them one for each that both do.
struct PairSets {
    uint32 words[2 * kPairWords];

    __device__ __forceinline__ void add(int set, int block) {
        if (block < kPairWindow) atomicOr(&words[set * kPairWords + block / 32], 1u << block % 32);
    }
};

// One warp's.
template <int query_group, int kv_block>
struct PairWalk {
    using List = KvWalk<query_group, kv_block, kv_block>;

    List own;
    const PairSets& sets;
    int shared = 0;   // tiles that both groups walk; they come first
    int in_sets = 0;  // tiles of the window
    int tiles;        // all
    int tail;         // the place of the sequence's last block; -1 where it is not listed

    int used;           // words of a set that have blocks
    int word;           // blocks from this word on are walked
    uint32 bits = 0;    // those left of it
    int looked_at = 0;  // places of the list, from its end, for blocks past the window
    int start = 0;      // of the last 32 of these a lane holds the first key of one
    unsigned left = 0;  // lanes whose block is still to be walked

    __device__ __forceinline__ PairWalk(const List& own, const List& other, PairSets& sets) : own(own), sets(sets) {
        const int lane = lane_id();
        used = min((own.num_kv_blocks + 31) / 32, kPairWords);
        word = kPairWords + used;
        for (int i = lane; i < 2 * kPairWords; i += 32) sets.words[i] = 0;
        __syncwarp();
        // Both lists at once: neither's loads wait for the other's.
        int past = 0;
#pragma unroll 2
        for (int place = lane; place < max(own.tiles, other.tiles); place += 32) {
            const int mine = place < own.tiles ? own.block_start(place) / kv_block : -1;
            const int theirs = place < other.tiles ? other.block_start(place) / kv_block : -1;
            if (mine >= 0) sets.add(0, mine);
            if (theirs >= 0) sets.add(1, theirs);
            past += mine >= kPairWindow;
        }
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < used; i += 32) {
            const uint32 mine = sets.words[i], theirs = sets.words[kPairWords + i];
            sets.words[i] = mine & ~theirs;
            sets.words[kPairWords + i] = mine & theirs;
            in_sets += __popc(mine);
            shared += __popc(mine & theirs);
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
            in_sets += __shfl_xor_sync(0xFFFFFFFF, in_sets, step);
            past += __shfl_xor_sync(0xFFFFFFFF, past, step);
            shared += __shfl_xor_sync(0xFFFFFFFF, shared, step);
        }
        __syncwarp();
        // Counted and not the list's length: a list that names a block twice walks it once.
        tiles = in_sets + past;
        const int last = own.num_kv_blocks - 1;
        if (last < kPairWindow) {
            const auto has = [&](int set) { return (sets.words[set * kPairWords + last / 32] >> last % 32 & 1) != 0; };
            tail = has(1) ? 0 : has(0) ? shared : -1;
        } else {
            tail = own.tiles > 0 && own.block_start(own.tiles - 1) == last * kv_block ? in_sets : -1;
        }
    }

    // First key of tile t. The whole warp asks, for t = 0, 1, 2, ...
    __device__ __forceinline__ int tile_start(int t) {
        if (t < in_sets) {
            while (bits == 0) {
                if (word == kPairWords) word = used;  // from what both list to what this group alone does
                bits = sets.words[--word];
            }
            const int bit = 31 - __clz(bits);
            bits ^= 1u << bit;
            return (word % kPairWords * 32 + bit) * kv_block;
        }
        while (left == 0) {
            const int place = own.tiles - 1 - looked_at - lane_id();
            start = place >= 0 ? own.block_start(place) : 0;
            left = __ballot_sync(0xFFFFFFFF, start >= kPairWindow * kv_block);
            looked_at += 32;
        }
        const int lane = __ffs(left) - 1;
        left &= left - 1;
        return __shfl_sync(0xFFFFFFFF, start, lane);
    }
};

}  // namespace dsv
