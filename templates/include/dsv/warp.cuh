// Sums and votes over a warp and over a CTA, always in the same order: butterflies, then warps by index.
#pragma once
#include "dsv/types.cuh"

namespace dsv {

constexpr uint32 kFullWarp = 0xffffffffu;

__device__ __forceinline__ int32 lane_index() { return static_cast<int32>(threadIdx.x % 32); }
__device__ __forceinline__ int32 warp_index() { return static_cast<int32>(threadIdx.x / 32); }

// Every lane gets the result.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
    return x;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
    return x;
}

__device__ __forceinline__ int32 warp_sum(int32 x) { return __reduce_add_sync(kFullWarp, x); }

// The sum of the lanes at or below this one.
__device__ __forceinline__ int32 warp_inclusive_sum(int32 x) {
    const int lane = lane_index();
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int32 below = __shfl_up_sync(kFullWarp, x, offset);
        if (lane >= offset) x += below;
    }
    return x;
}

// Lanes below this one whose bit is set.
__device__ __forceinline__ int32 bits_below(uint32 ballot) { return __popc(ballot & ((1u << lane_index()) - 1u)); }

// Every thread of a CTA of kWarps warps gets the sum. `scratch` may be used again after the call.
template <int kWarps, typename T>
__device__ __forceinline__ T cta_sum(T x, T (&scratch)[kWarps]) {
    x = warp_sum(x);
    if (lane_index() == 0) scratch[warp_index()] = x;
    __syncthreads();
    T total = scratch[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) total += scratch[i];
    __syncthreads();
    return total;
}

template <int kWarps>
__device__ __forceinline__ float cta_max(float x, float (&scratch)[kWarps]) {
    x = warp_max(x);
    if (lane_index() == 0) scratch[warp_index()] = x;
    __syncthreads();
    float largest = scratch[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) largest = fmaxf(largest, scratch[i]);
    __syncthreads();
    return largest;
}

// Ors the bits into the device error flag, once a warp. All lanes of the warp must call.
__device__ __forceinline__ void raise_error(int32* flag, int32 bits) {
    bits = __reduce_or_sync(kFullWarp, static_cast<uint32>(bits));
    if (bits != 0 && lane_index() == 0) atomicOr(flag, bits);
}

}  // namespace dsv
