#pragma once
// Copy-engine transfers. Tensor maps have 128-byte swizzle; a tile lands as tile.cuh says. Where head_dim is whole slabs
// they are 5-D, (64 columns, seq, head_dim / 64, head, batch) with a box of (64, rows, head_dim / 64, 1, 1): one copy a
// tile. Else, and where a tile is put together from several blocks, they are 4-D, (head_dim, seq, head, batch) with a box
// of (64, rows, 1, 1): one copy a slab, so that columns past head_dim arrive as zeros and are not stored.
#include "dsv/mbarrier.cuh"
#include "dsv/tile.cuh"
#include "dsv/types.cuh"

namespace dsv {

// What L2 does with the lines of a copy, as createpolicy encodes it: tiles that one CTA alone reads are the first to go, sums
// that many CTAs add to the last.
enum class L2 : uint64 { kNormal = 0, kEvictFirst = 0x12F0000000000000, kEvictLast = 0x14F0000000000000 };

__device__ __forceinline__ void tma_prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Loads tokens [seq, seq + box) of one head, as many as the box of a 4-D map has, into rows of a tile of `rows` tokens; tokens
// past the end arrive as zeros.
template <int head_dim, uint32 rows, L2 policy = L2::kNormal>
__device__ __forceinline__ void tma_load_rows(void* smem, const TensorMap* map, uint64* barrier, int seq, int head,
                                              int batch) {
#pragma unroll
    for (int slab = 0; slab < slabs(head_dim); ++slab) {
        const uint32 to = smem_address(smem) + slab * slab_bytes(rows);
        if constexpr (policy == L2::kNormal) {
            asm volatile(
                "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
                "l"(map), "r"(smem_address(barrier)), "r"(slab * kSlabColumns), "r"(seq), "r"(head), "r"(batch)
                : "memory");
        } else {
            asm volatile(
                "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
                "l"(map), "r"(smem_address(barrier)), "r"(slab * kSlabColumns), "r"(seq), "r"(head), "r"(batch),
                "l"(static_cast<uint64>(policy))
                : "memory");
        }
    }
}

// Loads the tile of tokens [seq, seq + rows) of one head, tile_bytes(rows, head_dim); tokens past the end arrive as zeros.
template <int head_dim, uint32 rows, L2 policy = L2::kNormal>
__device__ __forceinline__ void tma_load_tile(void* smem, const TensorMap* map, uint64* barrier, int seq, int head,
                                              int batch) {
    if constexpr (head_dim % kSlabColumns != 0) {
        tma_load_rows<head_dim, rows, policy>(smem, map, barrier, seq, head, batch);
    } else if constexpr (policy == L2::kNormal) {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
            " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(smem_address(smem)),
            "l"(map), "r"(smem_address(barrier)), "r"(0), "r"(seq), "r"(0), "r"(head), "r"(batch)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem_address(smem)),
            "l"(map), "r"(smem_address(barrier)), "r"(0), "r"(seq), "r"(0), "r"(head), "r"(batch),
            "l"(static_cast<uint64>(policy))
            : "memory");
    }
}

// Stores a tile of `rows` tokens; tokens past the end are not written.
template <int head_dim, uint32 rows>
__device__ __forceinline__ void tma_store_tile(const TensorMap* map, const void* smem, int seq, int head, int batch) {
    if constexpr (head_dim % kSlabColumns == 0) {
        asm volatile(
            "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
            "r"(smem_address(smem)), "r"(0), "r"(seq), "r"(0), "r"(head), "r"(batch)
            : "memory");
    } else {
#pragma unroll
        for (int slab = 0; slab < slabs(head_dim); ++slab) {
            asm volatile(
                "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                "r"(smem_address(smem) + slab * slab_bytes(rows)), "r"(slab * kSlabColumns), "r"(seq), "r"(head),
                "r"(batch)
                : "memory");
        }
    }
}

// Loads 32-bit values [first, first + box) of one row of a 2-D map without swizzle; `smem` is aligned to 128 bytes.
__device__ __forceinline__ void tma_load_row(void* smem, const TensorMap* map, uint64* barrier, int first, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            smem_address(smem)),
        "l"(map), "r"(smem_address(barrier)), "r"(first), "r"(row)
        : "memory");
}

// Adds contiguous f32 (a multiple of 16 bytes, both sides 16-byte aligned) to global memory, in any order; L2 keeps the sums.
__device__ __forceinline__ void bulk_reduce_add(float* global, const float* smem, uint32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, %3;" ::"l"(global),
                 "r"(smem_address(smem)), "r"(bytes), "l"(static_cast<uint64>(L2::kEvictLast))
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the last `pending` committed stores of this thread have read their shared memory.
template <int pending = 0>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

// Orders this thread's ordinary shared-memory accesses before later ones of the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace dsv
