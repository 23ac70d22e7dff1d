// grad_norm_f32_d0_v8_sm90a
// Generated from templates/kernels/grad_norm.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// grad_norm, f32, vector 8, sm90a

// First of two steps of the gradient's norm: one f64 sum of squares a CTA, and the first tensor in the CTA's range
// that holds a value which is not finite. grad_clip adds the sums in order. f64 because squares of finite f32
// values overflow f32. Floor: the gradient read once.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 48;
// END CONFIG

constexpr int kWarps = kThreads / 32;
constexpr int32 kNone = 0x7fffffff;

struct Params {
    const float* grad;      // [count]
    const int32* segments;  // [tensors + 1], ascending, in units: tensor i is grad[unit segments[i] .. unit segments[i + 1]]
    double* partial;        // [gridDim.x], written
    int32* culprit;         // [gridDim.x], written: tensor, or 2^31 - 1
    int64 count;
    int32 tensors;
    int32 segment_unit;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::GradNorm");

// The last tensor that begins at or before `element`; kNone for elements outside all tensors.
__device__ __noinline__ int32 tensor_of(const Params& p, int64 element) {
    const int64 at = element / p.segment_unit;
    int low = 0;
    int high = p.tensors;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (p.segments[middle] <= at) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return p.tensors > 0 && p.segments[low] <= at && at < p.segments[low + 1] ? low : kNone;
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) grad_norm_f32_d0_v8_sm90a(const __grid_constant__ Params p) {
    __shared__ double sScratch[kWarps];
    __shared__ int32 sCulprit;
    if (threadIdx.x == 0) sCulprit = kNone;
    __syncthreads();
    double sum = 0.0;
    for_each_vector<kVector>(p.count, is_aligned(p.grad), [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float g[kWidth];
        load_vector(p.grad + first, g);
    #pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            sum += static_cast<double>(g[i]) * g[i];
            if (!(fabsf(g[i]) < kInf)) atomicMin(&sCulprit, tensor_of(p, first + i));
        }
    });
    sum = cta_sum(sum, sScratch);
    if (threadIdx.x == 0) {
        p.partial[blockIdx.x] = sum;
        p.culprit[blockIdx.x] = sCulprit;
    }
}
