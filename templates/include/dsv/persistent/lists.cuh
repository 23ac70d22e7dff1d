#pragma once
// What a CTA that takes task after task walks in each: sets of KV blocks, made from the lists ahead of their loads. A CTA
// of two neighbouring groups first walks the blocks that both list, which are loaded once, then those of each group alone.
#include "dsv/attention.cuh"
#include "dsv/kv_walk.cuh"
#include "dsv/types.cuh"

namespace dsv {

// Blocks of one task: a bit each. Longer sequences are several tasks of the same queries, the last blocks first.
constexpr int kWindowBlocks = 2048;
constexpr int kWindowWords = kWindowBlocks / 32;

// Tiles that all groups of the CTA walk, then each group's own, those of two groups by turns while both have some: a group
// with tiles ends with one of its own. Blocks are taken from the last to the first; of a tile of several the first taken lies
// last.
template <int groups>
struct Task {
    int shared;
    int own[groups];         // none with one group
    int tail[groups];        // the tile of a group's walk that has the sequence's last block; -1: none
    int tail_valid[groups];  // keys of that tile that exist
    int last_valid[groups];  // keys of the last tile, where a tile is several blocks
};

// All listed blocks; of two groups those of both, then of each alone.
template <int groups>
struct BlockSets {
    uint32 words[groups == 1 ? 1 : 3][kWindowWords];
};

// A set's blocks from the last to the first.
struct SetWalk {
    int word;  // of all sets; blocks from this word on are taken
    uint32 bits = 0;

    // Of the set with this number the first `used` words.
    __device__ __forceinline__ SetWalk(int set, int used) : word(set * kWindowWords + used) {}

    __device__ __forceinline__ int next(const uint32* words) {
        while (bits == 0) bits = words[--word];
        const int bit = 31 - __clz(bits);
        bits ^= 1u << bit;
        return word % kWindowWords * 32 + bit;
    }
};

// Makes the sets and the task of the blocks from `first` on that the groups list. One warp.
template <int query_group, int kv_block, int block_n, int groups>
__device__ __forceinline__ void make_task(BlockSets<groups>& sets, Task<groups>& task,
                                          const KvWalk<query_group, kv_block, kv_block> (&lists)[groups], int first,
                                          int seqlen_kv, int num_kv_blocks) {
    constexpr int kPerTile = block_n > kv_block ? block_n / kv_block : 1;  // blocks
    constexpr int kPerBlock = kv_block > block_n ? kv_block / block_n : 1;  // tiles
    const int lane = lane_id();
    int longest = 0;
#pragma unroll
    for (int g = 0; g < groups; ++g) {
        longest = max(longest, lists[g].tiles);
        for (int i = lane; i < kWindowWords; i += 32) sets.words[g][i] = 0;
    }
    __syncwarp();
    // Bits, so that a block that a list names twice is walked once.
#pragma unroll 2
    for (int place = lane; place < longest; place += 32) {
#pragma unroll
        for (int g = 0; g < groups; ++g) {
            if (place < lists[g].tiles) {
                const int block = lists[g].block_start(place) / kv_block - first;
                if (static_cast<uint32>(block) < kWindowBlocks) atomicOr(&sets.words[g][block / 32], 1u << block % 32);
            }
        }
    }
    __syncwarp();
    const int last = num_kv_blocks - 1 - first;
    const auto has_last = [&](int set) {
        return last < kWindowBlocks && (sets.words[set][last / 32] >> last % 32 & 1) != 0;
    };
    const int last_length = seqlen_kv - (num_kv_blocks - 1) * kv_block;
    const auto count = [&](int set) {
        return __reduce_add_sync(0xFFFFFFFF, __popc(sets.words[set][lane]) + __popc(sets.words[set][lane + 32]));
    };
    // Keys of a walk's tile of which the sequence's last block is the first taken.
    const auto tail_valid = [&](int blocks) {
        return (min(kPerTile, blocks) - 1) * kv_block + last_length - (kPerBlock - 1) * block_n;
    };
    const auto last_valid = [&](int blocks) { return blocks % kPerTile == 0 ? block_n : kv_block; };
    if constexpr (groups == 1) {
        const int blocks = count(0);
        if (lane == 0) {
            task.shared = (blocks + kPerTile - 1) / kPerTile * kPerBlock;
            task.own[0] = 0;
            task.tail[0] = has_last(0) ? 0 : -1;
            task.tail_valid[0] = tail_valid(blocks);
            task.last_valid[0] = last_valid(blocks);
        }
    } else {
        static_assert(groups == 2 && kPerBlock == 1, "two groups, whole blocks in a tile");
#pragma unroll
        for (int i = lane; i < kWindowWords; i += 32) {
            const uint32 a = sets.words[0][i], b = sets.words[1][i];
            sets.words[0][i] = a & b;
            sets.words[1][i] = a & ~b;
            sets.words[2][i] = b & ~a;
        }
        __syncwarp();
        int both = count(0), alone[2] = {count(1), count(2)};
        // A block without a partner counts as each group's own; and so do the last ones where a group has none else.
        while (both % kPerTile != 0 || (both > 0 && min(alone[0], alone[1]) == 0)) {
            const int word = sets.words[0][lane] != 0        ? lane
                             : sets.words[0][lane + 32] != 0 ? lane + 32
                                                             : kWindowWords;
            if (word == __reduce_min_sync(0xFFFFFFFF, word)) {
                const uint32 bit = sets.words[0][word] & -sets.words[0][word];
                sets.words[0][word] ^= bit;
                sets.words[1][word] |= bit;
                sets.words[2][word] |= bit;
            }
            __syncwarp();
            --both;
            ++alone[0];
            ++alone[1];
        }
        if (lane == 0) {
            task.shared = both / kPerTile;
#pragma unroll
            for (int g = 0; g < groups; ++g) {
                task.own[g] = (alone[g] + kPerTile - 1) / kPerTile;
                task.tail[g] = has_last(0) ? 0 : has_last(1 + g) ? task.shared : -1;
                task.tail_valid[g] = tail_valid(has_last(0) ? both : alone[g]);
                task.last_valid[g] = last_valid(alone[g]);
            }
        }
    }
}

}  // namespace dsv
