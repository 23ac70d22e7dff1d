// sum_rows_bf16_d0_v4_sm90a
// Generated from templates/kernels/sum_rows.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// sum_rows, bf16, vector 4, sm90a

// Column sums in f32, in a fixed order: dst[g, c] = factor sum over the rows r of chunk (g, c') of src[g, r, c].
// One launch of many chunks, then one that sums the chunks, is a sum over any number of rows with the same bits every
// time. Grid: (columns / 128, chunks, segments g). A warp takes every 8th row of its chunk, 4 columns a lane; the
// warps' sums are added in order through shared memory.
// Floor: src read once.
#include "dsv/types.cuh"
#include "dsv/vector.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 4;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 88;
// END CONFIG

constexpr int kWarps = kThreads / 32;
constexpr int kColumnsPerCta = 32 * kVector;
static_assert(kColumnsPerCta <= kThreads, "one thread adds up one column");

struct Params {
    Flat src;     // [segments, rows, row_stride >= columns]
    float* dst;   // [segments, chunks, columns] by the strides below
    int64 rows;   // of a segment
    int64 columns;
    int64 row_stride;
    int64 segment_stride;
    int64 dst_segment_stride;
    int64 dst_chunk_stride;
    int32 rows_per_chunk;
    int32 accumulate;  // dst += rather than dst =
    float factor;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::SumRows");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) sum_rows_bf16_d0_v4_sm90a(const __grid_constant__ Params p) {
    __shared__ float sSum[kWarps][kColumnsPerCta];
    const bool aligned = is_aligned(p.src) && p.row_stride % kVector == 0 && p.segment_stride % kVector == 0;
    const int64 begin = static_cast<int64>(blockIdx.y) * p.rows_per_chunk;
    const int64 end = min(begin + p.rows_per_chunk, p.rows);
    const int local = lane_index() * kVector;
    const int64 column = static_cast<int64>(blockIdx.x) * kColumnsPerCta + local;
    float sum[kVector] = {};
    for (int64 row = begin + warp_index(); row < end; row += kWarps) {
        const int64 first = blockIdx.z * p.segment_stride + row * p.row_stride + column;
        if (aligned && column + kVector <= p.columns) {
            float x[kVector];
            load_vector<Element>(p.src, first, x);
    #pragma unroll
            for (int i = 0; i < kVector; ++i) sum[i] += x[i];
        } else {
    #pragma unroll
            for (int i = 0; i < kVector; ++i) {
                if (column + i < p.columns) {
                    float x[1];
                    load_vector<Element>(p.src, first + i, x);
                    sum[i] += x[0];
                }
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < kVector; ++i) sSum[warp_index()][local + i] = sum[i];
    __syncthreads();
    if (threadIdx.x < kColumnsPerCta) {
        const int64 c = static_cast<int64>(blockIdx.x) * kColumnsPerCta + threadIdx.x;
        if (c < p.columns) {
            float total = 0.0f;
    #pragma unroll
            for (int i = 0; i < kWarps; ++i) total += sSum[i][threadIdx.x];
            float* dst = p.dst + blockIdx.z * p.dst_segment_stride + blockIdx.y * p.dst_chunk_stride + c;
            *dst = p.factor * total + (p.accumulate ? *dst : 0.0f);
        }
    }
}
