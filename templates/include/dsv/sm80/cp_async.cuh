#pragma once
// Tiles copied from global to shared memory while the threads go on: cp.async, 16 bytes an instruction.
//
// A tile is slabs of [rows][64 columns] of a 16-bit type: 128 bytes a row, in which 16-byte chunk c of row r lies at
// chunk c ^ (r % 8), so that eight rows of one chunk column touch every bank once.
#include "dsv/fragment.cuh"
#include "dsv/types.cuh"

namespace dsv {

// 16 bytes, or 16 zeros where the source does not exist; its address must be readable all the same.
__device__ __forceinline__ void copy_async(uint32 to, const void* from, bool exists) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

// Ends a group of this thread's copies; a group may be empty.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's newest groups are under way; a __syncthreads makes all threads' seen.
template <int pending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Byte of a swizzled tile of `rows` rows where 16-byte chunk `chunk` of row `row` lies.
template <uint32 rows>
__device__ __forceinline__ uint32 chunk_offset(int row, int chunk) {
    return (chunk / 8) * slab_bytes(rows) + row * kRowBytes + ((chunk % 8 ^ row % 8) << 4);
}

// Rows [first_row, first_row + rows) of one head into a swizzled tile, by `threads` threads; zeros from `seqlen` on.
template <class Element, int rows, int head_dim, int threads>
__device__ __forceinline__ void load_tile(void* tile, const Element* head, int64 stride_seq, int first_row, int seqlen) {
    constexpr int kChunks = head_dim / 8;
    constexpr int kRowsPerPass = threads / kChunks;
    static_assert(kRowsPerPass % 8 == 0, "a thread keeps its place in the swizzle from pass to pass");
    static_assert(rows % kRowsPerPass == 0, "whole passes");
    const int row = threadIdx.x / kChunks;
    const int chunk = threadIdx.x % kChunks;
    const uint32 to = smem_address(tile) + chunk_offset<rows>(row, chunk);
    const Element* from = head + 8 * chunk;
#pragma unroll
    for (int pass = 0; pass < rows / kRowsPerPass; ++pass) {
        const int at = first_row + row + pass * kRowsPerPass;
        copy_async(to + pass * kRowsPerPass * kRowBytes, from + min(at, seqlen - 1) * stride_seq, at < seqlen);
    }
}

// Writes a warp's 16 x N fragment, in operand form, to rows [row0, row0 + 16) of a swizzled tile of `rows` rows.
template <int N, uint32 rows>
__device__ __forceinline__ void write_fragment(uint8* tile, int row0, const uint32 (&a)[N / 16][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = row0 + lane / 4 + 8 * (i % 2);
            uint8* at = tile + chunk_offset<rows>(row, 2 * k + i / 2) + 4 * (lane % 4);
            *reinterpret_cast<uint32*>(at) = a[k][i];
        }
    }
}

// A warp copies `count` rows of a swizzled tile, from row0 on, to global memory; row 0 of the tile is row first_row of
// the head, and nothing is written from `seqlen` on.
template <class Element, int count, int head_dim, uint32 rows>
__device__ __forceinline__ void store_rows(const uint8* tile, int row0, Element* head, int64 stride_seq, int first_row,
                                           int seqlen) {
    constexpr int kChunks = head_dim / 8;
    constexpr int kRowsPerPass = 32 / kChunks;
    const int chunk = threadIdx.x % kChunks;
#pragma unroll
    for (int pass = 0; pass < count / kRowsPerPass; ++pass) {
        const int row = row0 + pass * kRowsPerPass + threadIdx.x % 32 / kChunks;
        if (first_row + row < seqlen) {
            const uint4 x = *reinterpret_cast<const uint4*>(tile + chunk_offset<rows>(row, chunk));
            *reinterpret_cast<uint4*>(head + (first_row + row) * stride_seq + 8 * chunk) = x;
        }
    }
}

}  // namespace dsv
