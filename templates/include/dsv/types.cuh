// Elements, vectors of them, and the structs a launch passes by value. Needs no header of CUDA.
#pragma once

namespace dsv {

using int8 = signed char;
using uint8 = unsigned char;
using int16 = short;
using uint16 = unsigned short;
using int32 = int;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInf = __builtin_bit_cast(float, 0x7f800000u);
static_assert(kInf > 3.4028234e38f, "kInf is not infinite");

// Bits of the device error flag; the same numbers as dsv_spec::params::error_bits.
constexpr int32 kIndexOutOfRange = 1;
constexpr int32 kCountOutOfRange = 2;
constexpr int32 kListNotAscending = 4;
constexpr int32 kScoreIsNan = 8;
constexpr int32 kTopKOutOfRange = 16;

struct Bf16 {
    uint16 bits;
};

struct F16 {
    uint16 bits;
};

static_assert(sizeof(Bf16) == 2 && sizeof(F16) == 2, "16-bit elements");

// A CUtensorMap: opaque, 64-byte aligned, only ever passed as __grid_constant__.
struct alignas(64) TensorMap {
    uint64 opaque[16];
};
static_assert(sizeof(TensorMap) == 128, "CUtensorMap is 128 bytes");

// A [batch, seq, head, dim] tensor; strides in elements, innermost stride 1.
struct TensorView {
    uint64 ptr;
    int64 stride_batch;
    int64 stride_seq;
    int64 stride_head;

    template <typename T>
    __device__ __forceinline__ T* at(int32 batch, int32 seq, int32 head) const {
        return reinterpret_cast<T*>(ptr) + batch * stride_batch + seq * stride_seq + head * stride_head;
    }
};
static_assert(sizeof(TensorView) == 32, "four 8-byte fields");

__device__ __forceinline__ float to_float(float x) { return x; }

// bf16 is the upper half of an f32: widening is a shift, exact for every value.
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32>(x.bits) << 16); }

__device__ __forceinline__ float to_float(F16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Rounds to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}

template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
    Bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

template <>
__device__ __forceinline__ F16 from_float<F16>(float x) {
    F16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two elements in one register: `low` at the lower address. The instruction takes the high half first.
template <typename T>
__device__ __forceinline__ uint32 pack2(float low, float high);

template <>
__device__ __forceinline__ uint32 pack2<Bf16>(float low, float high) {
    uint32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

template <>
__device__ __forceinline__ uint32 pack2<F16>(float low, float high) {
    uint32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// The element at the lower, and at the higher address of a packed pair.
template <typename T>
__device__ __forceinline__ float unpack_low(uint32 pair) {
    return to_float(T{static_cast<uint16>(pair)});
}

template <typename T>
__device__ __forceinline__ float unpack_high(uint32 pair) {
    return to_float(T{static_cast<uint16>(pair >> 16)});
}

template <>
__device__ __forceinline__ float unpack_high<Bf16>(uint32 pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

}  // namespace dsv
