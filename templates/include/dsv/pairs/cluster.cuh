#pragma once
// Two CTAs of a cluster: each arrives at the other's barriers and loads tiles for both.
#include "dsv/mbarrier.cuh"
#include "dsv/tile.cuh"
#include "dsv/types.cuh"

namespace dsv {

// This CTA in its cluster.
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The cluster's barrier, whole warps. What came before the arrival is seen in every CTA after the wait.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Arrives at the barrier that lies at the same place in another CTA of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(uint64* barrier, int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(smem_address(barrier)),
        "r"(rank)
        : "memory");
}

// tma_load_tile into both CTAs, at the same places; each one's barrier gets the bytes that arrive there.
template <int head_dim, uint32 rows>
__device__ __forceinline__ void tma_load_tile_for_both(void* smem, const TensorMap* map, uint64* barrier, int seq, int head,
                                                       int batch) {
    constexpr uint16 kBoth = 3;
    if constexpr (head_dim % kSlabColumns == 0) {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
            " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem_address(smem)),
            "l"(map), "r"(smem_address(barrier)), "r"(0), "r"(seq), "r"(0), "r"(head), "r"(batch), "h"(kBoth)
            : "memory");
    } else {
#pragma unroll
        for (int slab = 0; slab < slabs(head_dim); ++slab) {
            asm volatile(
                "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(smem_address(smem) + slab * slab_bytes(rows)),
                "l"(map), "r"(smem_address(barrier)), "r"(slab * kSlabColumns), "r"(seq), "r"(head), "r"(batch), "h"(kBoth)
                : "memory");
        }
    }
}

}  // namespace dsv
