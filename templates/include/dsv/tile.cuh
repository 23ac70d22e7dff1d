#pragma once
// How a tile of tokens lies in shared memory: slabs of [rows][64 columns] of a 16-bit type, 128 bytes a row, in swizzle
// atoms of 8 rows (1024 bytes), where 16-byte chunk c of row r lies at chunk c ^ (r % 8). Where head_dim is no multiple
// of 64 the last slab is partly zeros: it takes whole room, but products do not read it past head_dim.
#include "dsv/types.cuh"

namespace dsv {

constexpr int kSlabColumns = 64;
constexpr uint32 kRowBytes = 128;
constexpr uint32 kAtomBytes = 1024;

// Bytes between the 64-column slabs of a tile of `rows` rows.
__host__ __device__ constexpr uint32 slab_bytes(uint32 rows) { return rows * kRowBytes; }

__host__ __device__ constexpr int slabs(int head_dim) { return (head_dim + kSlabColumns - 1) / kSlabColumns; }

// Bytes of a tile of `rows` tokens, the zeros of the last slab included: also what the copy engine counts for it.
__host__ __device__ constexpr uint32 tile_bytes(uint32 rows, int head_dim) { return slabs(head_dim) * slab_bytes(rows); }

}  // namespace dsv
