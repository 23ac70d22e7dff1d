#pragma once
// Accumulator fragments of a warpgroup: thread `lane` of warp `w` holds rows 16 w + lane / 4 and + 8, columns
// 8 j + 2 (lane % 4) and + 1, in registers 4 j .. 4 j + 3 (two columns of the first row, then of the second).
#include "dsv/mbarrier.cuh"
#include "dsv/types.cuh"
#include "dsv/wgmma.cuh"

namespace dsv {

// An accumulator of N columns as A operand of a product over those columns: the layouts agree, so no shuffle.
template <class Element, int N>
__device__ __forceinline__ void to_operand(uint32 (&a)[N / 16][4], const float (&d)[N / 2]) {
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[k][i] = pack2<Element>(d[8 * k + 2 * i], d[8 * k + 2 * i + 1]);
    }
}

// Four 8x8 matrices of 16-bit elements; lane i gives the row address of matrix i / 8, row i % 8.
__device__ __forceinline__ void store_matrices(uint32 address, const uint32 (&m)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m[0]), "r"(m[1]),
                 "r"(m[2]), "r"(m[3])
                 : "memory");
}

__device__ __forceinline__ void load_matrices(uint32 (&m)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(address)
                 : "memory");
}

// Writes a warpgroup's 64 x N fragment, already in operand form, to rows [row0, row0 + 64) of a swizzled tile of
// `rows` rows, from column `column0` on, a multiple of 16.
template <int N, uint32 rows>
__device__ __forceinline__ void store_fragment(void* tile, int row0, const uint32 (&a)[N / 16][4], int column0 = 0) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    const int row = row0 + 16 * warp + lane % 8 + 8 * (lane / 8 % 2);
    const uint32 row_address = smem_address(tile) + row * kRowBytes;
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        const int step = column0 / 16 + k;
        const int chunk = 2 * (step % 4) + lane / 16;
        store_matrices(row_address + (step / 4) * slab_bytes(rows) + ((chunk ^ (row % 8)) << 4), a[k]);
    }
}

// Reads 64 rows and N columns of a swizzled tile of `rows` rows as A operand: the inverse of store_fragment.
template <int N, uint32 rows>
__device__ __forceinline__ void load_fragment(uint32 (&a)[N / 16][4], const void* tile, int row0) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32 % 4;
    const int row = row0 + 16 * warp + lane % 8 + 8 * (lane / 8 % 2);
    const uint32 row_address = smem_address(tile) + row * kRowBytes;
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
        const int chunk = 2 * (k % 4) + lane / 16;
        load_matrices(a[k], row_address + (k / 4) * slab_bytes(rows) + ((chunk ^ (row % 8)) << 4));
    }
}

// Over the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace dsv
