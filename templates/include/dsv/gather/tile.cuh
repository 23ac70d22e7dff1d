#pragma once
// Where the 8-row atoms of swizzled tiles lie, and warpgroup products between tiles that differ in it.
//
// A gathered tile of `rows` tokens is [rows / 8][slabs][8 rows][64 columns]: what the copy engine brings of 8 tokens, all
// their columns, is contiguous, and every 8 rows x 64 columns are one atom of the 128-byte swizzle. A plain tile
// (dsv/tile.cuh) is [slabs][rows][64 columns]. wgmma takes either: descriptors carry both strides.
#include "dsv/tile.cuh"
#include "dsv/wgmma.cuh"

namespace dsv {

// Bytes between 64-column slabs, and between groups of 8 rows.
template <uint32 rows>
struct PlainTile {
    static constexpr uint32 kSlab = slab_bytes(rows);
    static constexpr uint32 kGroup = kAtomBytes;
};
template <int head_dim>
struct GatheredTile {
    static constexpr uint32 kSlab = kAtomBytes;
    static constexpr uint32 kGroup = tile_bytes(8, head_dim);
};

// Descriptor of either kind of operand: K-major ignores the leading stride, between slabs of M or N in MN-major.
template <class Tile>
__device__ __forceinline__ uint64 describe(const void* smem) {
    const uint64 address = (smem_address(smem) & 0x3FFFF) >> 4;
    return address | (uint64{Tile::kSlab >> 4} << 16) | (uint64{Tile::kGroup >> 4} << 32) | (uint64{1} << 62);
}

// What a descriptor grows by to the k-th 16 of K: along columns, or along rows.
template <class Tile>
__device__ constexpr uint32 column_step(int k) { return (k / 4 * Tile::kSlab + k % 4 * 32) >> 4; }
template <class Tile>
__device__ constexpr uint32 row_step(int k) { return k * 2 * Tile::kGroup >> 4; }

// D[64 x N] = A B^T over `columns`: rows of both tiles.
template <class Element, int N, int columns, class TileA, class TileB>
__device__ __forceinline__ void product_of_rows(float (&d)[N / 2], const void* a, const void* b) {
    const uint64 at_a = describe<TileA>(a);
    const uint64 at_b = describe<TileB>(b);
#pragma unroll
    for (int k = 0; k < columns / 16; ++k) {
        wgmma_ss<Element, N, 0, 0>(d, at_a + column_step<TileA>(k), at_b + column_step<TileB>(k), k > 0);
    }
}

// D[64 x N] (+)= A B over `rows`: A in registers, N columns of a tile.
template <class Element, int N, int rows, class TileB>
__device__ __forceinline__ void product_over_rows(float (&d)[N / 2], const uint32 (&a)[rows / 16][4], const void* b,
                                                  bool add) {
    const uint64 at_b = describe<TileB>(b);
#pragma unroll
    for (int k = 0; k < rows / 16; ++k) wgmma_rs<Element, N, 1>(d, a[k], at_b + row_step<TileB>(k), add || k > 0);
}

// D[64 x N] += A^T B over `rows`: 64 columns of one tile, N of the other.
template <class Element, int N, int rows, class TileA, class TileB>
__device__ __forceinline__ void add_product_over_rows(float (&d)[N / 2], const void* a, const void* b) {
    const uint64 at_a = describe<TileA>(a);
    const uint64 at_b = describe<TileB>(b);
#pragma unroll
    for (int k = 0; k < rows / 16; ++k) {
        wgmma_ss<Element, N, 1, 1>(d, at_a + row_step<TileA>(k), at_b + row_step<TileB>(k), 1);
    }
}

}  // namespace dsv
