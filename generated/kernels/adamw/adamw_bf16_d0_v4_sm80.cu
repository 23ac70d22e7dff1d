// adamw_bf16_d0_v4_sm80
// Generated from templates/kernels/adamw.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// adamw, bf16, vector 4, sm80

// AdamW on f32 master weights, with a copy in the compute dtype (decoupled decay, bias-corrected):
//   g = factor grad;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
//   w = (1 - lr decay) w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps)
// A factor that is not finite leaves everything as it is: the step is skipped without asking the host.
// Floor: 30 bytes of HBM a weight (f32: grad read; w, m, v read and written; 2-byte copy written).
#include "dsv/types.cuh"
#include "dsv/vector.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 4;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 88;
// END CONFIG

struct Params {
    float* master;       // [count], updated
    float* moment1;      // [count], updated
    float* moment2;      // [count], updated
    const float* grad;   // [count]
    Element* weight;     // [count], written: master rounded
    const float* grad_factor;  // [1]
    int64 count;
    float lr;
    float beta1;
    float beta2;
    float eps;
    float weight_decay;
    float bias_correction1;  // 1 - beta1^step
    float bias_correction2;  // 1 - beta2^step
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::AdamW");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) adamw_bf16_d0_v4_sm80(const __grid_constant__ Params p) {
    const float factor = *p.grad_factor;
    if (!(fabsf(factor) < kInf)) return;
    const float keep = 1.0f - p.lr * p.weight_decay;
    const float size = p.lr / p.bias_correction1;
    const float root = rsqrtf(p.bias_correction2);
    const bool aligned =
        is_aligned(p.master) && is_aligned(p.moment1) && is_aligned(p.moment2) && is_aligned(p.grad) && is_aligned(p.weight);
    for_each_vector<kVector>(p.count, aligned, [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float w[kWidth], m[kWidth], v[kWidth], g[kWidth];
        load_vector(p.master + first, w);
        load_vector(p.moment1 + first, m);
        load_vector(p.moment2 + first, v);
        load_vector(p.grad + first, g);
    #pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const float scaled = g[i] * factor;
            m[i] = p.beta1 * m[i] + (1.0f - p.beta1) * scaled;
            v[i] = p.beta2 * v[i] + (1.0f - p.beta2) * scaled * scaled;
            w[i] = w[i] * keep - size * m[i] / (sqrtf(v[i]) * root + p.eps);
        }
        store_vector(p.master + first, w);
        store_vector(p.moment1 + first, m);
        store_vector(p.moment2 + first, v);
        store_vector(p.weight + first, w);
    });
}
