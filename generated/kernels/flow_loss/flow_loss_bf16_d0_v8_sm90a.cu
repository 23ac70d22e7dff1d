// flow_loss_bf16_d0_v8_sm90a
// Generated from templates/kernels/flow_loss.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// flow_loss, bf16, vector 8, sm90a

// Mean squared error of the velocity of sequence b, as one sum a CTA (sum_rows adds them in order), and its gradient:
//   partial = sum over the CTA's values of (pred - target)^2;  d_pred = gradient_factor (pred - target)
// Floor: pred and target read, d_pred written once. Grid x walks a sequence's values, grid y the sequences.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 48;
// END CONFIG

constexpr int kWarps = kThreads / 32;

struct Params {
    const Element* pred;    // [B, per_element]
    const float* target;    // [B, per_element]
    Element* d_pred;        // [B, per_element], written unless null
    float* partial;         // [B, gridDim.x], written
    int64 per_element;
    float gradient_factor;  // 2 weight / (B per_element)
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::FlowLoss");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) flow_loss_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    __shared__ float sScratch[kWarps];
    const int64 base = blockIdx.y * p.per_element;
    const bool aligned = is_aligned(p.pred + base) && is_aligned(p.target + base) && is_aligned(p.d_pred + base);
    float sum = 0.0f;
    for_each_vector<kVector>(p.per_element, aligned, [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float x[kWidth], target[kWidth];
        load_vector(p.pred + base + first, x);
        load_vector(p.target + base + first, target);
    #pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            x[i] -= target[i];
            sum += x[i] * x[i];
            x[i] *= p.gradient_factor;
        }
        if (p.d_pred != nullptr) store_vector(p.d_pred + base + first, x);
    });
    sum = cta_sum(sum, sScratch);
    if (threadIdx.x == 0) p.partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}
