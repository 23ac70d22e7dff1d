// gram_query_bf16_d128_r16_v1_sm90a
// Generated from templates/kernels/gram_query.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// gram_query, bf16, rows of 128, rank 16, vector 1, sm90a

// Predictor loss, first half: everything a query contributes, from Gram matrices of the centred keys of its head.
//   G = Kc^T Kc,  C = Lc^T Kc,  A = Lc^T Lc      (Kc, Lc: keys and low-rank keys minus their mean over S)
//   ab = scale l^T C q,  aa = l^T A l,  bb = scale^2 q^T G q      (q: query, l: low-rank query)
//   loss = 0.95 (1 - ab / |a||b|) + 0.05 (|a| / |b| - 1)^2
//   d_l = by_ab scale C q + 2 by_aa A l;   s = by_ab scale l, r = 2 by_aa l for gram_key
// G, C, A are exact sums kept as two 16-bit parts. Floors: q and l read once; S (D^2 + 2 R D) products a head, twice.
// Budget: 2 (D + R) rows of D or D + 32 elements in shared memory, R (d_lr) 16 to 64: at D = 128 and R = 16 90 KB, two CTAs a
// multiprocessor.
#include "dsv/operand.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 128;
constexpr int kRank = 16;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;
constexpr int kSmemBytes = 93728;
constexpr int kParamsBytes = 232;
// END CONFIG

constexpr int kSteps = kRank / 16;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerCta = 512;
// Rows of shared memory 4 pieces of 16 bytes apart modulo 8: a quarter warp's two rows of four pieces meet no bank
// twice.
constexpr int kStride = kHeadDim % 64 == 0 ? kHeadDim + 32 : kHeadDim;
constexpr int kRankStride = kRank + 8;
static_assert(kHeadDim % 32 == 0 && kStride % 64 == 32, "whole 16-byte pieces, and rows that fall into different banks");
static_assert(kRank % 16 == 0, "low-rank rows are whole k16 steps");
static_assert(kRowsPerCta % (16 * kWarps) == 0, "every warp takes as many tiles of 16 queries");
// Low-rank queries are read before the products with G, or after them: at 96 columns the one spills a register, at 128 the
// other.
constexpr bool kLoadsEarly = kHeadDim % 64 == 0;
constexpr float kCosineWeight = 0.95f;
constexpr float kNormWeight = 0.05f;
// |a|^2 is raised by this share of |b|^2: finite where the prediction is constant over the keys.
constexpr float kNormEpsilon = 1e-6f;
// |b|^2 up to which a query ranks nothing and contributes no gradient.
constexpr float kFlatRow = 1e-10f;

struct Params {
    TensorView q;            // [B, S, H, D]
    TensorView q_lr;         // [B, S, H, R]; all pointers and strides multiples of 8 elements
    TensorView d_q_lr;       // [B, S, H, R], written
    TensorView by_ab_rows;   // [B, S, H, R], written: s
    TensorView by_aa_rows;   // [B, S, H, R], written: r
    const float* gram_kk;    // [B, H, D, D]: K^T K, not centred
    const float* gram_lk;    // [B, H, R, D]: L^T K
    const float* gram_ll;    // [B, H, R, R]: L^T L
    const float* sum_k;      // [B, H, D]
    const float* sum_l;      // [B, H, R]
    float* loss;             // [B, gridDim.x, H], written: sum over the CTA's queries
    int32 batch;
    int32 num_heads;
    int32 seqlen;
    float scale;
    float gradient_factor;   // of the mean: weight / (B S H)
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::GramQuery");

struct SharedStorage {
    alignas(16) Element kk[2][kHeadDim][kStride];
    Element lk[2][kRank][kStride];
    Element ll[2][kRank][kRankStride];
    float loss[kWarps];
};
static_assert(sizeof(SharedStorage) <= kSmemBytes, "dynamic shared memory");

// Copies a Gram matrix to shared memory, centred: sum x y - (sum x)(sum y) / S, in two parts.
template <int kRows, int kColumns, int kRowStride>
__device__ __forceinline__ void load_centred(Element (&to)[2][kRows][kRowStride], const float* gram,
                                             const float* row_sum, const float* column_sum, float seqlen) {
    for (int i = threadIdx.x; i < kRows * kColumns; i += kThreads) {
        const int row = i / kColumns;
        const int column = i % kColumns;
        split(gram[i] - row_sum[row] * (column_sum[column] / seqlen), to[0][row][column], to[1][row][column]);
    }
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(kFullWarp, x, 1);
    return x + __shfl_xor_sync(kFullWarp, x, 2);
}

struct QueryLoss {
    float loss;
    float by_ab;
    float by_aa;
};

__device__ __forceinline__ QueryLoss query_loss(float ab, float aa, float bb) {
    if (!(bb > kFlatRow)) return {0.0f, 0.0f, 0.0f};
    // A Gram form may come out a rounding error below zero.
    aa = fmaxf(aa, 0.0f) + kNormEpsilon * bb;
    const float norms = sqrtf(aa) * sqrtf(bb);
    const float cosine = ab / norms;
    const float excess = sqrtf(aa / bb) - 1.0f;
    return {kCosineWeight * (1.0f - cosine) + kNormWeight * excess * excess, -kCosineWeight / norms,
            0.5f * kCosineWeight * cosine / aa + kNormWeight * excess / norms};
}

// Columns 4 c .. 4 c + 3 of a step of a low-rank row.
__device__ __forceinline__ void store_row(const TensorView& to, int token, int step, float x0, float x1, float x2, float x3) {
    Element* row = to.at<Element>(blockIdx.z, token, blockIdx.y) + 16 * step + 4 * (lane_index() % 4);
    *reinterpret_cast<uint2*>(row) = {pack2<Element>(x0, x1), pack2<Element>(x2, x3)};
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) gram_query_bf16_d128_r16_v1_sm90a(const __grid_constant__ Params p) {
    extern __shared__ uint4 dynamic[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(dynamic);
    const int lane = lane_index();
    {
        const int64 head = static_cast<int64>(blockIdx.z) * p.num_heads + blockIdx.y;
        const float* sum_k = p.sum_k + head * kHeadDim;
        const float* sum_l = p.sum_l + head * kRank;
        const float seqlen = static_cast<float>(p.seqlen);
        load_centred<kHeadDim, kHeadDim>(shared.kk, p.gram_kk + head * kHeadDim * kHeadDim, sum_k, sum_k, seqlen);
        load_centred<kRank, kHeadDim>(shared.lk, p.gram_lk + head * kRank * kHeadDim, sum_l, sum_k, seqlen);
        load_centred<kRank, kRank>(shared.ll, p.gram_ll + head * kRank * kRank, sum_l, sum_l, seqlen);
    }
    __syncthreads();

    float loss = 0.0f;
    for (int tile = warp_index(); tile < kRowsPerCta / 16; tile += kWarps) {
        const int token_low = blockIdx.x * kRowsPerCta + 16 * tile + lane / 4;
        const int token_high = token_low + 8;
        const bool valid_low = token_low < p.seqlen;
        const bool valid_high = token_high < p.seqlen;
        RowOperand<kHeadDim> q;
        q.load(valid_low ? p.q.at<const Element>(blockIdx.z, token_low, blockIdx.y) : nullptr,
               valid_high ? p.q.at<const Element>(blockIdx.z, token_high, blockIdx.y) : nullptr);
        LowRankOperand l[kSteps];
        const auto load_low_rank = [&] {
            const Element* low = p.q_lr.at<const Element>(blockIdx.z, token_low, blockIdx.y);
            const Element* high = p.q_lr.at<const Element>(blockIdx.z, token_high, blockIdx.y);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                l[step].load(valid_low ? low + 16 * step : nullptr, valid_high ? high + 16 * step : nullptr);
            }
        };
        if constexpr (kLoadsEarly) load_low_rank();

        float bb_low = 0.0f;
        float bb_high = 0.0f;
#pragma unroll
        for (int k = 0; k < kHeadDim / 32; ++k) {
            const uint32 pair_low[4] = {q.low[k].x, q.low[k].y, q.low[k].z, q.low[k].w};
            const uint32 pair_high[4] = {q.high[k].x, q.high[k].y, q.high[k].z, q.high[k].w};
#pragma unroll
            for (int u = 0; u < 4; ++u) {
                float d[4] = {};
                multiply_rows(d, q, &shared.kk[0][result_row(k, u)][0]);
                multiply_rows(d, q, &shared.kk[1][result_row(k, u)][0]);
                bb_low += d[0] * unpack_low<Element>(pair_low[u]) + d[1] * unpack_high<Element>(pair_low[u]);
                bb_high += d[2] * unpack_low<Element>(pair_high[u]) + d[3] * unpack_high<Element>(pair_high[u]);
            }
        }
        if constexpr (!kLoadsEarly) load_low_rank();
        // Result tiles v of step v / 2: columns 16 (v / 2) + 4 c + 2 (v % 2) and the next, which are register v % 2 of l.
        float cq[2 * kSteps][4] = {};
        float al[2 * kSteps][4] = {};
        float ab_low = 0.0f;
        float ab_high = 0.0f;
        float aa_low = 0.0f;
        float aa_high = 0.0f;
        const auto pair_low = [&](int v) { return v % 2 == 0 ? l[v / 2].low.x : l[v / 2].low.y; };
        const auto pair_high = [&](int v) { return v % 2 == 0 ? l[v / 2].high.x : l[v / 2].high.y; };
#pragma unroll
        for (int v = 0; v < 2 * kSteps; ++v) {
            const int row = 16 * (v / 2) + low_rank_result_row(v % 2);
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                multiply_rows(cq[v], q, &shared.lk[part][row][0]);
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    multiply_rows(al[v], l[step], &shared.ll[part][row][16 * step]);
                }
            }
            const float low0 = unpack_low<Element>(pair_low(v));
            const float low1 = unpack_high<Element>(pair_low(v));
            const float high0 = unpack_low<Element>(pair_high(v));
            const float high1 = unpack_high<Element>(pair_high(v));
            ab_low += low0 * cq[v][0] + low1 * cq[v][1];
            ab_high += high0 * cq[v][2] + high1 * cq[v][3];
            aa_low += low0 * al[v][0] + low1 * al[v][1];
            aa_high += high0 * al[v][2] + high1 * al[v][3];
        }
        const QueryLoss low = query_loss(p.scale * quad_sum(ab_low), quad_sum(aa_low), p.scale * p.scale * quad_sum(bb_low));
        const QueryLoss high =
            query_loss(p.scale * quad_sum(ab_high), quad_sum(aa_high), p.scale * p.scale * quad_sum(bb_high));
        // Of one row: its loss's derivatives, its registers of each step, and where its results stand in their tiles.
        const auto store = [&](int token, const QueryLoss& row, auto pair, int at) {
            if (lane % 4 == 0) loss += row.loss;
            const float by_ab = p.gradient_factor * row.by_ab * p.scale;
            const float by_aa = p.gradient_factor * 2.0f * row.by_aa;
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
                float d[4];
                float x[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int v = 2 * step + i / 2;
                    d[i] = by_ab * cq[v][at + i % 2] + by_aa * al[v][at + i % 2];
                    x[i] = i % 2 == 0 ? unpack_low<Element>(pair(v)) : unpack_high<Element>(pair(v));
                }
                store_row(p.d_q_lr, token, step, d[0], d[1], d[2], d[3]);
                store_row(p.by_ab_rows, token, step, by_ab * x[0], by_ab * x[1], by_ab * x[2], by_ab * x[3]);
                store_row(p.by_aa_rows, token, step, by_aa * x[0], by_aa * x[1], by_aa * x[2], by_aa * x[3]);
            }
        };
        if (valid_low) store(token_low, low, pair_low, 0);
        if (valid_high) store(token_high, high, pair_high, 2);
    }
    loss = cta_sum(loss, shared.loss);
    if (threadIdx.x == 0) {
        p.loss[(static_cast<int64>(blockIdx.z) * gridDim.x + blockIdx.x) * p.num_heads + blockIdx.y] = loss;
    }
}
