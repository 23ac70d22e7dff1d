#pragma once
// Counters in global memory by which CTAs of a launch tell each other what is done. Zeroed before the launch.
#include "dsv/types.cuh"

namespace dsv {

// One more. What the thread, and those it has synchronised with, wrote before is seen by who waited for it.
__device__ __forceinline__ void counter_add(uint32* counter) {
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// Until it has reached `goal`. Only for what CTAs do that start no later than this one.
__device__ __forceinline__ void counter_wait(const uint32* counter, uint32 goal) {
    uint32 count;
    while (true) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
        if (count >= goal) return;
        __nanosleep(200);
    }
}

}  // namespace dsv
