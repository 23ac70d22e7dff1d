// Activations in f32.
#pragma once
#include "dsv/types.cuh"

namespace dsv {

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + exp2_approx(-kLog2E * x)); }

// silu(x) = x sigmoid(x)
__device__ __forceinline__ float silu_derivative(float x) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

// gelu(x) = x/2 (1 + tanh z) = x sigmoid(2 z) with z = sqrt(2/pi) (x + 0.044715 x^3): no cancellation for x < 0.
constexpr float kTwoRootTwoOverPi = 1.5957691216057308f;
constexpr float kGeluCubic = 0.044715f;

__device__ __forceinline__ float gelu(float x) {
    return x * sigmoid(kTwoRootTwoOverPi * (x + kGeluCubic * x * x * x));
}

struct ValueAndDerivative {
    float value;
    float derivative;
};

__device__ __forceinline__ ValueAndDerivative gelu_with_derivative(float x) {
    const float s = sigmoid(kTwoRootTwoOverPi * (x + kGeluCubic * x * x * x));
    const float inner = kTwoRootTwoOverPi * (1.0f + 3.0f * kGeluCubic * x * x);
    // x (1 - s) inner overflows to inf * 0 for huge x, where the derivative is s.
    const float bend = s * (1.0f - s);
    return {x * s, bend == 0.0f ? s : s + x * bend * inner};
}

}  // namespace dsv
