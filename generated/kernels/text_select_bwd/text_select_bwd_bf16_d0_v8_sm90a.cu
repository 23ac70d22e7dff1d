// text_select_bwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/text_select_bwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// text_select_bwd, bf16, vector 8, sm90a

// Gradient of the embedding of no caption: d_null += sum over dropped b of d_out[b], in the order of b.
// Floor: dropped rows of d_out read once.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 48;
// END CONFIG

struct Params {
    Flat d_out;         // [B, per_element]
    const int32* drop;  // [B]
    float* d_null;      // [per_element], added to
    int64 per_element;
    int32 batch;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::TextSelectBwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) text_select_bwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    const bool aligned = is_aligned(p.d_out) && is_aligned(p.d_null) && p.per_element % kVector == 0;
    for_each_vector<kVector>(p.per_element, aligned, [&](auto width, int64 first) {
        constexpr int kWidth = decltype(width)::value;
        float sum[kWidth], d[kWidth];
        load_vector(p.d_null + first, sum);
        for (int b = 0; b < p.batch; ++b) {
            if (p.drop[b]) {
                load_vector<Element>(p.d_out, b * p.per_element + first, d);
    #pragma unroll
                for (int i = 0; i < kWidth; ++i) sum[i] += d[i];
            }
        }
        store_vector(p.d_null + first, sum);
    });
}
