// text_select_fwd_bf16_d0_v8_sm90a
// Generated from templates/kernels/text_select_fwd.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// text_select_fwd, bf16, vector 8, sm90a

// Caption drop-out: out[b] = drop[b] ? null : text[b]. Floor: out written, its source read once.
// Grid x walks an element's values, grid y the batch.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 40;
// END CONFIG

struct Params {
    const Element* text;  // [B, per_element]
    const Element* null;  // [per_element]: the learned embedding of no caption
    Element* out;         // [B, per_element], written
    const int32* drop;    // [B]
    int64 per_element;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::TextSelectFwd");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) text_select_fwd_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    const int64 base = blockIdx.y * p.per_element;
    const Element* from = p.drop[blockIdx.y] ? p.null : p.text + base;
    for_each_vector<kVector>(p.per_element, is_aligned(from) && is_aligned(p.out + base), [&](auto width, int64 first) {
        float x[decltype(width)::value];
        load_vector(from + first, x);
        store_vector(p.out + base + first, x);
    });
}
