// gram_key_bf16_d96_r16_v1_sm90a
// Generated from templates/kernels/gram_key.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// gram_key, bf16, rows of 96, rank 16, vector 1, sm90a

// Predictor loss, the gradient of the low-rank keys.
//   d_l_j = W (k_j - mean k) + M (l_j - mean l);   W (R x D) and M (R x R): sums over the queries, from gram_query
// The means make the gradient's sum over the keys zero, which is what centring demands. W and M are kept as two 16-bit
// parts. The first CTA of a head adds up the losses that gram_query left, too.
// Floor: k and l read, d_l written once. Budget: 2 R rows of D or D + 32 elements in shared memory, R (d_lr) 16 to 64; at
// R = 16 80 registers, three CTAs a multiprocessor: 24 warps that each wait for 4.5 KB most of the time.
#include "dsv/operand.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 96;
constexpr int kRank = 16;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 3;
constexpr int kSmemBytes = 7744;
constexpr int kParamsBytes = 152;
// END CONFIG

constexpr int kSteps = kRank / 16;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16 * kWarps;
constexpr int kColumns = kHeadDim + kRank;
constexpr int kRecord = kHeadDim * kColumns + kRank * kRank + kColumns;
// Rows 4 pieces of 16 bytes apart modulo 8: no bank is met twice.
constexpr int kStride = kHeadDim % 64 == 0 ? kHeadDim + 32 : kHeadDim;
constexpr int kRankStride = kRank + 8;
static_assert(kHeadDim % 32 == 0 && kStride % 64 == 32, "whole 16-byte pieces, and rows that fall into different banks");
static_assert(kRank % 16 == 0, "low-rank rows are whole k16 steps");

struct Params {
    TensorView k;           // [B, S, H, D]
    TensorView k_lr;        // [B, S, H, R]; all pointers and strides multiples of 8 elements
    TensorView d_k_lr;      // [B, S, H, R], written
    const float* weights;   // [B, H, R, D + R]: [W | M]
    const float* sums;      // [B, H, record] of gram_sums, which ends with the column sums of [K | L]
    const float* loss_partial;  // [loss_parts, H] of gram_query
    float* loss;            // [H], written
    int32 num_heads;
    int32 seqlen;
    int32 rows_per_chunk;   // tokens of a CTA of gram_sums
    int32 loss_parts;
    float loss_factor;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::GramKey");

struct SharedStorage {
    alignas(16) Element weight_k[2][kRank][kStride];
    Element weight_l[2][kRank][kRankStride];
    float mean[kRank];  // W mean(k) + M mean(l)
};
static_assert(sizeof(SharedStorage) == kSmemBytes, "SharedStorage differs from Facts");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) gram_key_bf16_d96_r16_v1_sm90a(const __grid_constant__ Params p) {
    extern __shared__ uint4 dynamic[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(dynamic);
    const int lane = lane_index();
    const int batch = blockIdx.z;
    const int h = blockIdx.y;
    const int64 head = static_cast<int64>(batch) * p.num_heads + h;
    const float* weights = p.weights + head * kRank * kColumns;
    const float* sum = p.sums + (head + 1) * kRecord - kColumns;
    for (int i = threadIdx.x; i < kRank * kHeadDim; i += kThreads) {
        const int row = i / kHeadDim;
        const int column = i % kHeadDim;
        split(weights[row * kColumns + column], shared.weight_k[0][row][column], shared.weight_k[1][row][column]);
    }
    for (int i = threadIdx.x; i < kRank * kRank; i += kThreads) {
        const int row = i / kRank;
        const int column = i % kRank;
        split(weights[row * kColumns + kHeadDim + column], shared.weight_l[0][row][column], shared.weight_l[1][row][column]);
    }
    for (int row = warp_index(); row < kRank; row += kWarps) {
        float mean = 0.0f;
        for (int i = lane; i < kColumns; i += 32) mean += weights[row * kColumns + i] * sum[i];
        mean = warp_sum(mean);
        if (lane == 0) shared.mean[row] = mean / p.seqlen;
    }
    if (blockIdx.x == 0 && batch == 0 && warp_index() == 0) {
        float loss = 0.0f;
        for (int i = lane; i < p.loss_parts; i += 32) loss += p.loss_partial[static_cast<int64>(i) * p.num_heads + h];
        loss = warp_sum(loss);
        if (lane == 0) p.loss[h] = p.loss_factor * loss;
    }
    __syncthreads();

    // First the last tiles of all chunks that a CTA of gram_sums had, then those before: what it read last is still in L2.
    const int chunks = (p.seqlen + p.rows_per_chunk - 1) / p.rows_per_chunk;
    const int tiles = (p.rows_per_chunk + kRows - 1) / kRows;
    for (int i = blockIdx.x; i < tiles * chunks; i += gridDim.x) {
        const int begin = i % chunks * p.rows_per_chunk;
        const int end = min(begin + p.rows_per_chunk, p.seqlen);
        const int token_low = begin + (tiles - 1 - i / chunks) * kRows + 16 * warp_index() + lane / 4;
        const int token_high = token_low + 8;
        const bool valid_low = token_low < end;
        const bool valid_high = token_high < end;
        if (__all_sync(kFullWarp, !valid_low)) continue;
        RowOperand<kHeadDim> k;
        k.load(valid_low ? p.k.at<const Element>(batch, token_low, h) : nullptr,
               valid_high ? p.k.at<const Element>(batch, token_high, h) : nullptr);
        const Element* l_low = p.k_lr.at<const Element>(batch, token_low, h);
        const Element* l_high = p.k_lr.at<const Element>(batch, token_high, h);
        LowRankOperand l[kSteps];
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            l[step].load(valid_low ? l_low + 16 * step : nullptr, valid_high ? l_high + 16 * step : nullptr);
        }
        // Sixteen columns of the gradient at a time.
#pragma unroll
        for (int to = 0; to < kRank; to += 16) {
            float d[2][4] = {};
#pragma unroll
            for (int v = 0; v < 2; ++v) {
                const int row = to + low_rank_result_row(v);
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    multiply_rows(d[v], k, &shared.weight_k[part][row][0]);
#pragma unroll
                    for (int step = 0; step < kSteps; ++step) {
                        multiply_rows(d[v], l[step], &shared.weight_l[part][row][16 * step]);
                    }
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) d[v][i] -= shared.mean[to + 4 * (lane % 4) + 2 * v + i % 2];
            }
            const int column = to + 4 * (lane % 4);
            if (valid_low) {
                Element* at = p.d_k_lr.at<Element>(batch, token_low, h) + column;
                *reinterpret_cast<uint2*>(at) = {pack2<Element>(d[0][0], d[0][1]), pack2<Element>(d[1][0], d[1][1])};
            }
            if (valid_high) {
                Element* at = p.d_k_lr.at<Element>(batch, token_high, h) + column;
                *reinterpret_cast<uint2*>(at) = {pack2<Element>(d[0][2], d[0][3]), pack2<Element>(d[1][2], d[1][3])};
            }
        }
    }
}
