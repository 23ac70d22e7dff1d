// mma.sync m16n8k16: the warp-wide product for operands that live in registers.
//
// Lane l, r = l / 4, c = 2 (l % 4):  a[0] = A[r][c, c+1]      a[1] = A[r+8][c, c+1]
//                                    a[2] = A[r][c+8, c+9]    a[3] = A[r+8][c+8, c+9]
//                                    b[0] = B[c, c+1][r]      b[1] = B[c+8, c+9][r]
//                                    d[0], d[1] = D[r][c, c+1]   d[2], d[3] = D[r+8][c, c+1]
// The inner index may be renumbered as long as A and B agree.
#pragma once
#include "dsv/types.cuh"

namespace dsv {

// d += a b, f32 accumulation.
template <typename Element>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1);

template <>
__device__ __forceinline__ void mma_16x8x16<Bf16>(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16x8x16<F16>(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace dsv
