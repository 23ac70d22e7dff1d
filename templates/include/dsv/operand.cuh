// Operands of mma.sync read in 16-byte pieces. Within 32 consecutive inner columns, lane quarter c = l % 4 holds
// columns 8 c .. 8 c + 7: its registers 0, 1 are the pairs of the first k16 step, registers 2, 3 those of the second.
// A and B are read alike, so the product does not notice. Result columns are renumbered the same way (result_row), so
// that a lane's results stand at the columns of its own operand registers.
#pragma once
#include "dsv/mma.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

namespace dsv {

// 16 rows x kColumns of a matrix: piece[k] of row l / 4 in the first half, of row l / 4 + 8 in the second.
template <int kColumns>
struct RowOperand {
    static constexpr int kPieces = kColumns / 32;
    uint4 low[kPieces];
    uint4 high[kPieces];

    // Null rows are read as zeros.
    template <typename Element>
    __device__ __forceinline__ void load(const Element* row_low, const Element* row_high) {
        const int column = 8 * (lane_index() % 4);
#pragma unroll
        for (int k = 0; k < kPieces; ++k) {
            low[k] = high[k] = {0, 0, 0, 0};
            if (row_low != nullptr) low[k] = __ldg(reinterpret_cast<const uint4*>(row_low + 32 * k + column));
            if (row_high != nullptr) high[k] = __ldg(reinterpret_cast<const uint4*>(row_high + 32 * k + column));
        }
    }
};

// d += rows . B^T for the eight rows of B at `row` (this lane's: result_row), which lie in shared memory.
template <typename Element, int kColumns>
__device__ __forceinline__ void multiply_rows(float (&d)[4], const RowOperand<kColumns>& rows, const Element* row) {
    const Element* from = row + 8 * (lane_index() % 4);
#pragma unroll
    for (int k = 0; k < kColumns / 32; ++k) {
        const uint4 b = *reinterpret_cast<const uint4*>(from + 32 * k);
        const uint32 first[4] = {rows.low[k].x, rows.high[k].x, rows.low[k].y, rows.high[k].y};
        const uint32 second[4] = {rows.low[k].z, rows.high[k].z, rows.low[k].w, rows.high[k].w};
        mma_16x8x16<Element>(d, first, b.x, b.y);
        mma_16x8x16<Element>(d, second, b.z, b.w);
    }
}

// The row of B this lane must give for result tile u of piece k, so that results d[0], d[1] (row l / 4) and d[2], d[3]
// (row l / 4 + 8) stand at columns 32 k + 8 c + 2 u and + 1: the pair in register u of the lane's own piece k.
__device__ __forceinline__ int result_row(int k, int u) {
    const int n = lane_index() / 4;
    return 32 * k + 8 * (n / 2) + 2 * u + n % 2;
}

// The same for operands of 16 columns: lane quarter c holds columns 4 c .. 4 c + 3 in two registers.
struct LowRankOperand {
    uint2 low;
    uint2 high;

    template <typename Element>
    __device__ __forceinline__ void load(const Element* row_low, const Element* row_high) {
        const int column = 4 * (lane_index() % 4);
        low = high = {0, 0};
        if (row_low != nullptr) low = __ldg(reinterpret_cast<const uint2*>(row_low + column));
        if (row_high != nullptr) high = __ldg(reinterpret_cast<const uint2*>(row_high + column));
    }
};

template <typename Element>
__device__ __forceinline__ void multiply_rows(float (&d)[4], const LowRankOperand& rows, const Element* row) {
    const uint2 b = *reinterpret_cast<const uint2*>(row + 4 * (lane_index() % 4));
    const uint32 a[4] = {rows.low.x, rows.high.x, rows.low.y, rows.high.y};
    mma_16x8x16<Element>(d, a, b.x, b.y);
}

// The row of a 16-row B for result tile v: results stand at columns 4 c + 2 v and + 1.
__device__ __forceinline__ int low_rank_result_row(int v) {
    const int n = lane_index() / 4;
    return 4 * (n / 2) + 2 * v + n % 2;
}

// A value as the sum of two elements: 16 bits of mantissa in bf16.
template <typename Element>
__device__ __forceinline__ void split(float x, Element& coarse, Element& fine) {
    coarse = from_float<Element>(x);
    fine = from_float<Element>(x - to_float(coarse));
}

}  // namespace dsv
