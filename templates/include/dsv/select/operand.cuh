// What the selection kernels share: groups' queries and keys as operands of mma.sync, and scores as integers of the same
// order. Rows have d_lr columns and are multiplied 16 at a time, a step. Within a step lane quarter c = l % 4 reads
// columns 4 c .. 4 c + 3: four lanes take a row's 32 bytes in one instruction. As inner indices those columns stand at
// c, c + 1, c + 8, c + 9; A and B are read alike, so the product does not notice.
#pragma once
#include "dsv/mma.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

namespace dsv {

// Operand A of 16 queries: registers 0 to 3 of each lane, step by step.
template <int kRank>
struct QueryOperand {
    static_assert(kRank % 16 == 0, "whole steps");
    uint4 registers[kRank / 16][32];
};

// One warp writes row `row` of an operand: the query of token first + centre, or the mean of the len queries from
// `first`, rounded to the element once. Zeros where there are none.
template <typename Element, bool kMean, int kRank>
__device__ __forceinline__ void write_query(QueryOperand<kRank>& operand, int row, const TensorView& q_lr, int first,
                                            int len, int centre) {
    // A lane takes 8 columns; lanes to spare take the last ones again.
    constexpr int kLanes = kRank == 16 ? 2 : kRank == 32 ? 4 : 8;
    const int lane = lane_index();
    const int piece = min(lane % kLanes, kRank / 8 - 1);
    float sum[8] = {};
    if (len > 0) {
        const auto add = [&](int token) {
            const Element* source = q_lr.at<const Element>(blockIdx.z, first + token, blockIdx.y);
            const uint4 columns = *reinterpret_cast<const uint4*>(source + 8 * piece);
            const uint32 pairs[4] = {columns.x, columns.y, columns.z, columns.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum[2 * i] += unpack_low<Element>(pairs[i]);
                sum[2 * i + 1] += unpack_high<Element>(pairs[i]);
            }
        };
        if constexpr (kMean) {
            for (int token = lane / kLanes; token < len; token += 32 / kLanes) add(token);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
#pragma unroll
                for (int offset = kLanes; offset < 32; offset *= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], offset);
                sum[i] /= static_cast<float>(len);
            }
        } else {
            add(centre);
        }
    }
    if (lane < kLanes) {
        // Quarters 2 (piece % 2) and the next, each two registers: of rows 0 to 7 the first and third, of 8 to 15 the
        // second and fourth.
        uint32* to = &operand.registers[piece / 2][row % 8 * 4 + piece % 2 * 2].x + row / 8;
#pragma unroll
        for (int i = 0; i < 4; ++i) to[2 * i] = pack2<Element>(sum[2 * i], sum[2 * i + 1]);
    }
}

// This lane's registers of one step.
template <int kRank>
__device__ __forceinline__ void read_operand(const QueryOperand<kRank>& operand, int step, uint32 (&to)[4]) {
    const uint32 address = static_cast<uint32>(__cvta_generic_to_shared(&operand.registers[step][lane_index()]));
    // Volatile: what is read again for every product must not be kept in registers instead.
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

// Operand B of a key, this lane's part of each step.
template <typename Element, int kSteps>
__device__ __forceinline__ void load_key(uint2 (&key)[kSteps], const Element* row) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        key[step] = __ldg(reinterpret_cast<const uint2*>(row + 16 * step + 4 * (lane_index() % 4)));
    }
}

// Whether a unit is listed before all others, its score +inf: it has one of the first keep_first tokens, or one of the group's
// own (where keep_own is not 0; key token i is query token i), or its bit in the group's row of keep_mask is set. `key` is its
// first key and exists; a group past the last has no row.
template <int kQueryGroup, int kKvBlock, class Params>
__device__ __forceinline__ bool is_kept(const Params& p, int key, int group) {
    const int own_first = group * kQueryGroup;
    const bool is_own = p.keep_own != 0 && key < own_first + kQueryGroup && min(key + kKvBlock, p.seqlen_kv) > own_first;
    bool is_masked = false;
    if (p.keep_mask != nullptr && group < p.num_groups) {
        asm volatile("" : "+r"(key), "+r"(group));  // rare: nothing of it is worth a register all along
        const int unit = key / kKvBlock;
        const int words = (p.num_kv_blocks + 31) / 32;
        is_masked = (__ldg(p.keep_mask + static_cast<int64>(group) * words + unit / 32) >> unit % 32 & 1) != 0;
    }
    return key < p.keep_first || is_own || is_masked;
}

// A score as an integer of the same order; equal scores, the two zeros included, become equal integers.
__device__ __forceinline__ uint32 ordered(float score) {
    const uint32 bits = __float_as_uint(score + 0.0f);
    return bits ^ (static_cast<uint32>(static_cast<int32>(bits) >> 31) | 0x80000000u);
}

// NaN wins, so that one NaN key marks its unit.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

}  // namespace dsv
