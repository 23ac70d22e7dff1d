// profile_logits_bf16_d96_v1_sm90a
// Generated from templates/kernels/profile_logits.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// profile_logits, bf16, rows of 96, vector 1, sm90a

// Profiler, first step: logits of 16 sampled queries against all keys, in base 2.
//   logit(i, j) = scale log2(e) <q(sample_i), k_j>
// Floor: 2 D bytes of K a key and 16 samples, through L2; 64 bytes of logits written. Grid: (ceil(samples / 16), chunks
// of 1024 keys, heads [head0, head0 + gridDim.z)), one sequence a launch: the logits of all of them would not fit.
#include "dsv/operand.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 96;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 104;
// END CONFIG

constexpr int kWarps = kThreads / 32;
constexpr int kKeysPerCta = 1024;
static_assert(kHeadDim % 32 == 0, "whole 16-byte pieces");

struct Params {
    TensorView q;          // [B, S, H, D]
    TensorView k;          // [B, S, H, D]; pointers and strides multiples of 8 elements
    const int32* samples;  // [samples]: token ids
    float* logits;         // [gridDim.z, samples, S], written
    int32 batch_index;     // the sequence of this launch
    int32 head0;           // the head of blockIdx.z = 0
    int32 num_samples;
    int32 seqlen_q;
    int32 seqlen_kv;
    float scale_log2;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::ProfileLogits");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) profile_logits_bf16_d96_v1_sm90a(const __grid_constant__ Params p) {
    const int lane = lane_index();
    const int head = p.head0 + blockIdx.z;
    const int sample_low = blockIdx.x * 16 + lane / 4;
    const int sample_high = sample_low + 8;
    const auto query = [&](int sample) -> const Element* {
        if (sample >= p.num_samples) return nullptr;
        const int token = min(max(p.samples[sample], 0), p.seqlen_q - 1);
        return p.q.at<const Element>(p.batch_index, token, head);
    };
    RowOperand<kHeadDim> q;
    q.load(query(sample_low), query(sample_high));
    float* logits = p.logits + static_cast<int64>(blockIdx.z) * p.num_samples * p.seqlen_kv;

    const int end = min(static_cast<int>(blockIdx.y + 1) * kKeysPerCta, p.seqlen_kv);
    for (int key0 = blockIdx.y * kKeysPerCta + 8 * warp_index(); key0 < end; key0 += 8 * kWarps) {
        const int key = min(key0 + lane / 4, p.seqlen_kv - 1);
        float d[4] = {};
        multiply_rows(d, q, p.k.at<const Element>(p.batch_index, key, head));
        const int column = key0 + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int sample = i < 2 ? sample_low : sample_high;
            const int at = column + i % 2;
            if (sample < p.num_samples && at < p.seqlen_kv) {
                logits[static_cast<int64>(sample) * p.seqlen_kv + at] = p.scale_log2 * d[i];
            }
        }
    }
}
