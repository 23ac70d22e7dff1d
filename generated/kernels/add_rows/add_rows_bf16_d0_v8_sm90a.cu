// add_rows_bf16_d0_v8_sm90a
// Generated from templates/kernels/add_rows.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// add_rows, bf16, vector 8, sm90a

// out[r, :] = a[r, :] + b for every row r: a bias, or a table broadcast over rows. out may be a.
// Floor: a read, out written once. Grid x walks a row in vectors, grid y the rows.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 8;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 64;
// END CONFIG

struct Params {
    Flat a;    // [rows, columns]
    Flat b;    // [columns]
    Flat out;  // [rows, columns], written
    int64 rows;
    int64 columns;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::AddRows");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) add_rows_bf16_d0_v8_sm90a(const __grid_constant__ Params p) {
    const bool aligned = is_aligned(p.a) && is_aligned(p.b) && is_aligned(p.out) && p.columns % kVector == 0;
    for (int64 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        for_each_vector<kVector>(p.columns, aligned, [&](auto width, int64 first) {
            constexpr int kWidth = decltype(width)::value;
            float a[kWidth], b[kWidth];
            load_vector<Element>(p.a, row * p.columns + first, a);
            load_vector<Element>(p.b, first, b);
    #pragma unroll
            for (int i = 0; i < kWidth; ++i) a[i] += b[i];
            store_vector<Element>(p.out, row * p.columns + first, a);
        });
    }
}
