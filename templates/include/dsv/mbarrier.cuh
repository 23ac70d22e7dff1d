#pragma once
// Barriers: mbarriers in shared memory for data that arrives by TMA, named hardware barriers for threads.
#include "dsv/types.cuh"

namespace dsv {

// Shared-memory address as PTX wants it.
__device__ __forceinline__ uint32 smem_address(const void* pointer) {
    return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void mbarrier_init(uint64* barrier, uint32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the copy engine; a __syncthreads must follow.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// One arrival that also announces the bytes the copy engine will deliver in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64* barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64* barrier, uint32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(smem_address(barrier)),
        "r"(parity)
        : "memory");
}

// This CTA's place in the grid. Volatile, so that each role reads it where it starts: kept from the top of a
// kernel it is what a producer of few registers spills.
__device__ __forceinline__ int3 cta_index() {
    int3 index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index.x));
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(index.y));
    asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(index.z));
    return index;
}

// This thread's lane; volatile for the same reason.
__device__ __forceinline__ int lane_id() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// This thread's warpgroup. By way of a shuffle, so that the compiler knows it to be the same in all lanes and keeps what
// follows from it (descriptors above all) in uniform registers.
__device__ __forceinline__ int warpgroup_index() { return __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0); }

// Named hardware barriers. Id 0 is __syncthreads. The unaligned forms are used because warpgroups reach different
// instructions of the same barrier.
__device__ __forceinline__ void named_sync(uint32 id, uint32 threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(uint32 id, uint32 threads) {
    asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A ring of stages: index and phase advance together.
template <int stages>
struct RingState {
    uint32 index = 0;
    uint32 phase = 0;
    __device__ __forceinline__ void advance() {
        if (++index == stages) {
            index = 0;
            phase ^= 1;
        }
    }
};

}  // namespace dsv
