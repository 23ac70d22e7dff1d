#pragma once
// Products of a warp on swizzled tiles (dsv/sm80/cp_async.cuh): ldmatrix brings operands, mma.sync m16n8k16 multiplies.
//
// ldmatrix.x4 takes four 8x8 matrices; lane l gives the row address of matrix l / 8, row l % 8, and receives of each
// matrix the pair at row l / 4, columns 2 (l % 4) and + 1 (transposed: the pair at column l / 4, rows 2 (l % 4) and + 1).
// The order in which matrices are named decides which register is which:
//   A[m][k] of a tile with rows m, chunks k, and B[k][n] of one with rows k, chunks n (transposed): rows first.
//   B[k][n] of a tile with rows n, chunks k, and A[m][k] of one with rows k, chunks m (transposed): chunks first.
#include "dsv/fragment.cuh"
#include "dsv/mma.cuh"
#include "dsv/types.cuh"

namespace dsv {

// Where this lane reads 16 rows x 16 columns of a swizzled tile, and steps from there.
struct LaneView {
    uint32 row_address;
    uint32 chunk;  // this lane's of the two, swizzled by its row

    // `row_step` is a multiple of 8, `first_chunk` even: both leave the swizzle of the lane's row as it is.
    template <uint32 rows>
    __device__ __forceinline__ uint32 at(int row_step, int first_chunk) const {
        return row_address + (first_chunk / 8) * slab_bytes(rows) + row_step * kRowBytes + ((first_chunk % 8 ^ chunk) << 4);
    }
};

// Matrices in the order (row 0, chunk 0), (row 8, chunk 0), (row 0, chunk 1), (row 8, chunk 1).
__device__ __forceinline__ LaneView rows_first(const void* tile, int row0) {
    const int lane = threadIdx.x % 32;
    const int row = row0 + lane % 16;
    return {smem_address(tile) + row * kRowBytes, static_cast<uint32>(lane / 16 ^ row % 8)};
}

// Matrices in the order (row 0, chunk 0), (row 0, chunk 1), (row 8, chunk 0), (row 8, chunk 1).
__device__ __forceinline__ LaneView chunks_first(const void* tile, int row0) {
    const int lane = threadIdx.x % 32;
    const int row = row0 + lane % 8 + 8 * (lane / 16);
    return {smem_address(tile) + row * kRowBytes, static_cast<uint32>(lane / 8 % 2 ^ row % 8)};
}

__device__ __forceinline__ void load_matrices_transposed(uint32 (&m)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

// The two 8-column halves of 16 columns at once.
template <class Element>
__device__ __forceinline__ void multiply(float* d, const uint32 (&a)[4], const uint32 (&b)[4]) {
    mma_16x8x16<Element>(*reinterpret_cast<float(*)[4]>(d), a, b[0], b[1]);
    mma_16x8x16<Element>(*reinterpret_cast<float(*)[4]>(d + 4), a, b[2], b[3]);
}

// d += A B^T over head_dim: tiles of 16 rows of A (rows_first) by N rows of B (chunks_first).
template <class Element, int m_tiles, int N, int head_dim, uint32 rows_a, uint32 rows_b>
__device__ __forceinline__ void gemm_rows(float (&d)[m_tiles][N / 2], const LaneView& a, const LaneView& b) {
#pragma unroll
    for (int k = 0; k < head_dim / 16; ++k) {
        uint32 left[m_tiles][4];
#pragma unroll
        for (int m = 0; m < m_tiles; ++m) load_matrices(left[m], a.template at<rows_a>(16 * m, 2 * k));
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            uint32 right[4];
            load_matrices(right, b.template at<rows_b>(16 * n, 2 * k));
#pragma unroll
            for (int m = 0; m < m_tiles; ++m) multiply<Element>(&d[m][8 * n], left[m], right);
        }
    }
}

// d += A B: A in registers, B the K rows of a tile (rows_first), N columns of it from 16-byte chunk `first_chunk` on.
template <class Element, int m_tiles, int N, int K, uint32 rows_b>
__device__ __forceinline__ void gemm_columns(float (&d)[m_tiles][N / 2], const uint32 (&a)[m_tiles][K / 16][4],
                                             const LaneView& b, int first_chunk) {
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            uint32 right[4];
            load_matrices_transposed(right, b.template at<rows_b>(16 * k, first_chunk + 2 * n));
#pragma unroll
            for (int m = 0; m < m_tiles; ++m) multiply<Element>(&d[m][8 * n], a[m][k], right);
        }
    }
}

}  // namespace dsv
