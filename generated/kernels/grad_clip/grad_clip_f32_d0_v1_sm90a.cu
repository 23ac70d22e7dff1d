// grad_clip_f32_d0_v1_sm90a
// Generated from templates/kernels/grad_clip.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// grad_clip, f32, vector 1, sm90a

// Second step of the gradient's norm, one CTA: norm = sqrt(sum of the partial sums, in order),
// factor = min(1, max_norm / (norm + 1e-6)), NaN where the norm is not finite; culprit = the first bad tensor or -1.
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 40;
// END CONFIG

constexpr int kWarps = kThreads / 32;
constexpr int32 kNone = 0x7fffffff;

struct Params {
    const double* partial;          // [parts]
    const int32* partial_culprit;   // [parts]
    float* clip;                    // [2], written: norm, factor
    int32* culprit;                 // [1], written
    int32 parts;
    float max_norm;                 // infinite for no clipping
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::GradClip");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) grad_clip_f32_d0_v1_sm90a(const __grid_constant__ Params p) {
    __shared__ double sScratch[kWarps];
    __shared__ int32 sCulprit;
    if (threadIdx.x == 0) sCulprit = kNone;
    __syncthreads();
    double sum = 0.0;
    int32 first = kNone;
    for (int i = threadIdx.x; i < p.parts; i += kThreads) {
        sum += p.partial[i];
        first = min(first, p.partial_culprit[i]);
    }
    atomicMin(&sCulprit, first);
    sum = cta_sum(sum, sScratch);
    if (threadIdx.x == 0) {
        const double norm = sqrt(sum);
        // Also false for a norm beyond f32.
        const bool finite = static_cast<float>(norm) < kInf;
        p.clip[0] = static_cast<float>(norm);
        p.clip[1] = finite ? fminf(1.0f, static_cast<float>(p.max_norm / (norm + 1e-6))) : __int_as_float(0x7fffffff);
        *p.culprit = sCulprit == kNone ? -1 : sCulprit;
    }
}
