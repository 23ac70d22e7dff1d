#pragma once
// Warpgroup products on 128-byte-swizzled tiles: descriptors, ordering, and products over a whole K extent.
//
// Tiles lie as tile.cuh says.
//   K-major  (columns are the product's K): k16 step +32 bytes inside the row, next 64 columns +rows * 128.
//   MN-major (rows are the product's K):    k16 step +2048 bytes, next 64 columns of M or N +rows * 128.
#include "dsv/mbarrier.cuh"
#include "dsv/tile.cuh"
#include "dsv/wgmma_shapes.cuh"

namespace dsv {

// Descriptor of a K-major operand. The stride between 8-row groups is one atom; the leading stride is ignored.
__device__ __forceinline__ uint64 descriptor_k_major(const void* smem) {
    const uint64 address = (smem_address(smem) & 0x3FFFF) >> 4;
    return address | (uint64{1} << 16) | (uint64{kAtomBytes >> 4} << 32) | (uint64{1} << 62);
}

// Descriptor of an MN-major operand of a tile of `rows` rows: leading stride between slabs of 64 M or N, stride
// between groups of 8 K rows one atom.
template <uint32 rows>
__device__ __forceinline__ uint64 descriptor_mn_major(const void* smem) {
    const uint64 address = (smem_address(smem) & 0x3FFFF) >> 4;
    return address | (uint64{slab_bytes(rows) >> 4} << 16) | (uint64{kAtomBytes >> 4} << 32) | (uint64{1} << 62);
}

// Registers written by ordinary code are visible to the wgmma instructions that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Pins accumulators in their registers across an asynchronous product.
template <int count>
__device__ __forceinline__ void pin(float (&d)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// D[64 x N] = A B^T over K = head_dim: A's 64 rows lie in a tile of `rows_a` rows, B is a tile of `rows_b` rows
// of which N are taken, both K-major.
template <class Element, int N, int head_dim, uint32 rows_a, uint32 rows_b>
__device__ __forceinline__ void gemm_ss_kk(float (&d)[N / 2], const void* a, const void* b) {
    const uint64 desc_a = descriptor_k_major(a);
    const uint64 desc_b = descriptor_k_major(b);
#pragma unroll
    for (int k = 0; k < head_dim / 16; ++k) {
        const uint32 step_a = (k / 4) * slab_bytes(rows_a) + (k % 4) * 32;
        const uint32 step_b = (k / 4) * slab_bytes(rows_b) + (k % 4) * 32;
        wgmma_ss<Element, N, 0, 0>(d, desc_a + (step_a >> 4), desc_b + (step_b >> 4), k > 0);
    }
}

// The same with A's fragments in registers: shared memory's port gives B alone.
template <class Element, int N, int head_dim, uint32 rows_b>
__device__ __forceinline__ void gemm_rs_kk(float (&d)[N / 2], const uint32 (&a)[head_dim / 16][4], const void* b) {
    const uint64 desc_b = descriptor_k_major(b);
#pragma unroll
    for (int k = 0; k < head_dim / 16; ++k) {
        const uint32 step_b = (k / 4) * slab_bytes(rows_b) + (k % 4) * 32;
        wgmma_rs<Element, N, 0>(d, a[k], desc_b + (step_b >> 4), k > 0);
    }
}

// D[64 x N] += A B over K = rows: A fragments in registers, B an MN-major tile of `rows` rows and N columns.
template <class Element, int N, uint32 rows>
__device__ __forceinline__ void gemm_rs_mn(float (&d)[N / 2], const uint32 (&a)[rows / 16][4], const void* b) {
    const uint64 desc_b = descriptor_mn_major<rows>(b);
#pragma unroll
    for (int k = 0; k < rows / 16; ++k) {
        wgmma_rs<Element, N, 1>(d, a[k], desc_b + (k * 2 * kAtomBytes >> 4), 1);
    }
}

// D[64 x N] += A B over K = rows: A a K-major tile of 64 rows and `rows` columns, at most a slab, B an MN-major tile of
// `rows` rows.
template <class Element, int N, uint32 rows>
__device__ __forceinline__ void gemm_ss_k_mn(float (&d)[N / 2], const void* a, const void* b) {
    static_assert(rows <= kSlabColumns, "A is one slab");
    const uint64 desc_a = descriptor_k_major(a);
    const uint64 desc_b = descriptor_mn_major<rows>(b);
#pragma unroll
    for (int k = 0; k < rows / 16; ++k) {
        wgmma_ss<Element, N, 0, 1>(d, desc_a + (k * 32 >> 4), desc_b + (k * 2 * kAtomBytes >> 4), 1);
    }
}

// D[64 x N] = A^T B over K = rows: A a tile of `rows` rows and 64 columns, B columns of a tile of `rows` rows.
template <class Element, int N, uint32 rows>
__device__ __forceinline__ void gemm_ss_mn(float (&d)[N / 2], const void* a, const void* b) {
    const uint64 desc_a = descriptor_mn_major<rows>(a);
    const uint64 desc_b = descriptor_mn_major<rows>(b);
#pragma unroll
    for (int k = 0; k < rows / 16; ++k) {
        const uint32 step = k * 2 * kAtomBytes >> 4;
        wgmma_ss<Element, N, 1, 1>(d, desc_a + step, desc_b + step, k > 0);
    }
}

template <int registers>
__device__ __forceinline__ void registers_grow() {
    if constexpr (registers > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
__device__ __forceinline__ void registers_shrink() {
    if constexpr (registers > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

}  // namespace dsv
