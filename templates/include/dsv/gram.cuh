// Tokens of the predictor's kernels in shared memory: rows [x | l] of a full row and its low-rank row, 16 bytes apart
// from whole 32-byte steps, so that eight rows of one 16-byte chunk touch every bank once.
#pragma once
#include "dsv/sm80/cp_async.cuh"
#include "dsv/sm80/products.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

namespace dsv {

// Elements between rows of `columns` elements, a multiple of 16.
constexpr int padded_stride(int columns) { return columns + 8; }

// As copy_async; the lines are the first that L2 gives up.
__device__ __forceinline__ void copy_async_evict_first(uint32 to, const void* from, bool exists) {
    // As createpolicy encodes evict_first for every line.
    constexpr uint64 kPolicy = 0x12F0000000000000;
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0),
                 "l"(kPolicy)
                 : "memory");
}

// Threads 0 .. kThreads - 1 copy kRows rows of kColumns columns, from `first` on; zeros from `seqlen` on.
template <int kColumns, int kThreads, bool kEvictFirst = false, typename Element, int kRows, int kStride>
__device__ __forceinline__ void copy_columns(Element (&to)[kRows][kStride], int column0, int thread, const Element* head,
                                             int64 stride_seq, int first, int seqlen) {
    constexpr int kChunks = kColumns / 8;
    constexpr int kLanes = kChunks <= 2 ? 2 : kChunks <= 4 ? 4 : kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
    static_assert(kChunks <= kLanes, "rows of up to 256 columns");
    constexpr int kRowsPerPass = kThreads / kLanes;
    const int row = thread / kLanes;
    const int chunk = thread % kLanes;
    if (chunk >= kChunks || (kRowsPerPass > kRows && row >= kRows)) return;
    const uint32 at = smem_address(&to[row][column0 + 8 * chunk]);
    const Element* from = head + (first + row) * stride_seq + 8 * chunk;
#pragma unroll
    for (int pass = 0; pass < (kRows + kRowsPerPass - 1) / kRowsPerPass; ++pass) {
        const bool exists = first + row + pass * kRowsPerPass < seqlen;
        const uint32 pass_at = at + pass * kRowsPerPass * kStride * static_cast<int>(sizeof(Element));
        if constexpr (kEvictFirst) {
            copy_async_evict_first(pass_at, exists ? from : head, exists);
        } else {
            copy_async(pass_at, exists ? from : head, exists);
        }
        from += kRowsPerPass * stride_seq;
    }
}

// Where this lane reads 16 rows x 16 columns by ldmatrix, in elements: in the orders that dsv/sm80/products.cuh names.
template <int kStride>
__device__ __forceinline__ int rows_first_offset() {
    const int lane = lane_index();
    return lane % 16 * kStride + lane / 16 * 8;
}

template <int kStride>
__device__ __forceinline__ int chunks_first_offset() {
    const int lane = lane_index();
    return (lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8;
}

// d += the sums over the 16 inner indices of the rows of A, in every column.
template <typename Element>
__device__ __forceinline__ void add_rows(float (&d)[4], const uint32 (&a)[4]) {
    const uint32 ones = pack2<Element>(1.0f, 1.0f);
    mma_16x8x16<Element>(d, a, ones, ones);
}

}  // namespace dsv
