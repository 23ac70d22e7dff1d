// gram_key_bf16_d96_v1_sm90a
// Generated from templates/kernels/gram_key.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// gram_key, bf16, rows of 96, vector 1, sm90a

// Predictor loss, second half: the gradient of the low-rank keys.
//   d_l_j = W (k_j - mean k) + M (l_j - mean l);   W = sum over queries of s q^T (16 x D), M = sum of r l^T (16 x 16)
// with s, r from gram_query and the two sums from a matrix product. The means make the gradient's sum over the keys
// zero, which is what centring demands. W and M are kept as two 16-bit parts.
// Floor: k and l read, d_l written once. Budget: 32 rows of D or D + 32 elements in shared memory.
#include "dsv/operand.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 96;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 144;
// END CONFIG

constexpr int kRank = 16;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerCta = 512;
// Rows 4 pieces of 16 bytes apart modulo 8: no bank is met twice.
constexpr int kStride = kHeadDim % 64 == 0 ? kHeadDim + 32 : kHeadDim;
constexpr int kRankStride = kRank + 8;
static_assert(kHeadDim % 32 == 0 && kStride % 64 == 32, "whole 16-byte pieces, and rows that fall into different banks");
static_assert(kRowsPerCta % (16 * kWarps) == 0, "every warp takes as many tiles of 16 keys");

struct Params {
    TensorView k;           // [B, S, H, D]
    TensorView k_lr;        // [B, S, H, 16]; all pointers and strides multiples of 8 elements
    TensorView d_k_lr;      // [B, S, H, 16], written
    const float* weight_k;  // [B, H, 16, D]: W
    const float* weight_l;  // [B, H, 16, 16]: M
    const float* sum_k;     // [B, H, D]
    const float* sum_l;     // [B, H, 16]
    int32 batch;
    int32 num_heads;
    int32 seqlen;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::GramKey");

struct SharedStorage {
    alignas(16) Element weight_k[2][kRank][kStride];
    Element weight_l[2][kRank][kRankStride];
    float mean[kRank];  // W mean(k) + M mean(l)
};

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) gram_key_bf16_d96_v1_sm90a(const __grid_constant__ Params p) {
    __shared__ SharedStorage shared;
    const int lane = lane_index();
    const int64 head = static_cast<int64>(blockIdx.z) * p.num_heads + blockIdx.y;
    const float* weight_k = p.weight_k + head * kRank * kHeadDim;
    const float* weight_l = p.weight_l + head * kRank * kRank;
    for (int i = threadIdx.x; i < kRank * kHeadDim; i += kThreads) {
        const int row = i / kHeadDim;
        const int column = i % kHeadDim;
        split(weight_k[i], shared.weight_k[0][row][column], shared.weight_k[1][row][column]);
    }
    for (int i = threadIdx.x; i < kRank * kRank; i += kThreads) {
        split(weight_l[i], shared.weight_l[0][i / kRank][i % kRank], shared.weight_l[1][i / kRank][i % kRank]);
    }
    for (int row = warp_index(); row < kRank; row += kWarps) {
        float sum = 0.0f;
        for (int i = lane; i < kHeadDim; i += 32) sum += weight_k[row * kHeadDim + i] * p.sum_k[head * kHeadDim + i];
        if (lane < kRank) sum += weight_l[row * kRank + lane] * p.sum_l[head * kRank + lane];
        sum = warp_sum(sum);
        if (lane == 0) shared.mean[row] = sum / p.seqlen;
    }
    __syncthreads();

    for (int tile = warp_index(); tile < kRowsPerCta / 16; tile += kWarps) {
        const int token_low = blockIdx.x * kRowsPerCta + 16 * tile + lane / 4;
        const int token_high = token_low + 8;
        const bool valid_low = token_low < p.seqlen;
        const bool valid_high = token_high < p.seqlen;
        RowOperand<kHeadDim> k;
        LowRankOperand l;
        k.load(valid_low ? p.k.at<const Element>(blockIdx.z, token_low, blockIdx.y) : nullptr,
               valid_high ? p.k.at<const Element>(blockIdx.z, token_high, blockIdx.y) : nullptr);
        l.load(valid_low ? p.k_lr.at<const Element>(blockIdx.z, token_low, blockIdx.y) : nullptr,
               valid_high ? p.k_lr.at<const Element>(blockIdx.z, token_high, blockIdx.y) : nullptr);
        float d[2][4] = {};
#pragma unroll
        for (int v = 0; v < 2; ++v) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                multiply_rows(d[v], k, &shared.weight_k[part][low_rank_result_row(v)][0]);
                multiply_rows(d[v], l, &shared.weight_l[part][low_rank_result_row(v)][0]);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) d[v][i] -= shared.mean[4 * (lane % 4) + 2 * v + i % 2];
        }
        if (valid_low) {
            Element* row = p.d_k_lr.at<Element>(blockIdx.z, token_low, blockIdx.y) + 4 * (lane % 4);
            *reinterpret_cast<uint2*>(row) = {pack2<Element>(d[0][0], d[0][1]), pack2<Element>(d[1][0], d[1][1])};
        }
        if (valid_high) {
            Element* row = p.d_k_lr.at<Element>(blockIdx.z, token_high, blockIdx.y) + 4 * (lane % 4);
            *reinterpret_cast<uint2*>(row) = {pack2<Element>(d[0][2], d[0][3]), pack2<Element>(d[1][2], d[1][3])};
        }
    }
}
