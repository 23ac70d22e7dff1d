#pragma once
// The tiles of a query group's list of small units, block_n tokens of several units each, walked from the end of the
// list to its beginning, so that only the first tile taken can be short: of units, or of tokens past the sequence.
#include "dsv/attention.cuh"
#include "dsv/types.cuh"

namespace dsv {

template <int query_group, int kv_block, int block_n>
struct GatherWalk {
    static constexpr int kUnits = block_n / kv_block;  // of a tile
    static_assert(block_n % kv_block == 0, "a tile is whole units");

    const int32* index;  // this group's list
    int32* error_flag;
    int count;  // of listed units
    int tiles;  // to walk
    int num_units;

    __device__ __forceinline__ GatherWalk(const int32* q2k_index, const int32* q2k_count, int32* flag,
                                          const AttnSizes& sizes, int first_row, int head, int batch)
        : error_flag(flag), num_units(sizes.num_kv_blocks) {
        const int64 row = (int64{batch} * sizes.num_heads + head) * sizes.num_groups + first_row / query_group;
        index = q2k_index + row * sizes.max_selected;
        count = q2k_count[row];
        if (static_cast<unsigned>(count) > static_cast<unsigned>(sizes.max_selected)) {
            atomicOr(error_flag, kCountOutOfRange);
            count = count < 0 ? 0 : sizes.max_selected;
        }
        tiles = (count + kUnits - 1) / kUnits;
    }

    // Place in the list of the first unit of the t-th tile walked.
    __device__ __forceinline__ int first_place(int t) const { return (tiles - 1 - t) * kUnits; }

    // First token of the unit at a place, or `otherwise` past the list; an id out of range is clamped and reported.
    __device__ __forceinline__ int unit_start(int place, int otherwise) const {
        if (place >= count) return otherwise;
        int unit = index[place];
        if (static_cast<unsigned>(unit) >= static_cast<unsigned>(num_units)) {
            atomicOr(error_flag, kIndexOutOfRange);
            unit = num_units - 1;
        }
        return unit * kv_block;
    }

    // Tokens of the first tile walked that exist: they come first in it. Of a list only the last unit can be short.
    __device__ __forceinline__ int valid_in_first(int seqlen_kv) const {
        const int missing = unit_start(count - 1, 0) + kv_block - seqlen_kv;
        return (count - first_place(0)) * kv_block - (missing > 0 ? missing : 0);
    }
};

}  // namespace dsv
