// gram_query_bf16_d96_v1_sm90a
// Generated from templates/kernels/gram_query.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// gram_query, bf16, rows of 96, vector 1, sm90a

// Predictor loss, first half: everything a query contributes, from Gram matrices of the centred keys of its head.
//   G = Kc^T Kc,  C = Lc^T Kc,  A = Lc^T Lc      (Kc, Lc: keys and low-rank keys minus their mean over S)
//   ab = scale l^T C q,  aa = l^T A l,  bb = scale^2 q^T G q      (q: query, l: low-rank query)
//   loss = 0.95 (1 - ab / |a||b|) + 0.05 (|a| / |b| - 1)^2
//   d_l = by_ab scale C q + 2 by_aa A l;   s = by_ab scale l, r = 2 by_aa l for gram_key
// G, C, A are exact sums kept as two 16-bit parts. Floors: q and l read once; S (D^2 + 32 D) products a head, twice.
// Budget: 2 (D + 16) rows of D or D + 32 elements in shared memory, 90 KB at D = 128: two CTAs a multiprocessor.
#include "dsv/operand.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 96;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 2;
constexpr int kSmemBytes = 44576;
constexpr int kParamsBytes = 232;
// END CONFIG

constexpr int kRank = 16;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerCta = 512;
// Rows of shared memory 4 pieces of 16 bytes apart modulo 8: a quarter warp's two rows of four pieces meet no bank
// twice.
constexpr int kStride = kHeadDim % 64 == 0 ? kHeadDim + 32 : kHeadDim;
constexpr int kRankStride = kRank + 8;
static_assert(kHeadDim % 32 == 0 && kStride % 64 == 32, "whole 16-byte pieces, and rows that fall into different banks");
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
    TensorView q_lr;         // [B, S, H, 16]; all pointers and strides multiples of 8 elements
    TensorView d_q_lr;       // [B, S, H, 16], written
    TensorView by_ab_rows;   // [B, S, H, 16], written: s
    TensorView by_aa_rows;   // [B, S, H, 16], written: r
    const float* gram_kk;    // [B, H, D, D]: K^T K, not centred
    const float* gram_lk;    // [B, H, 16, D]: L^T K
    const float* gram_ll;    // [B, H, 16, 16]: L^T L
    const float* sum_k;      // [B, H, D]
    const float* sum_l;      // [B, H, 16]
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

// Columns 4 c .. 4 c + 3 of a low-rank row, from the result tiles' pair for that row, scaled.
__device__ __forceinline__ void store_row(const TensorView& to, int token, float x0, float x1, float x2, float x3) {
    Element* row = to.at<Element>(blockIdx.z, token, blockIdx.y) + 4 * (lane_index() % 4);
    *reinterpret_cast<uint2*>(row) = {pack2<Element>(x0, x1), pack2<Element>(x2, x3)};
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) gram_query_bf16_d96_v1_sm90a(const __grid_constant__ Params p) {
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
        LowRankOperand l;
        const auto load_low_rank = [&] {
            l.load(valid_low ? p.q_lr.at<const Element>(blockIdx.z, token_low, blockIdx.y) : nullptr,
                   valid_high ? p.q_lr.at<const Element>(blockIdx.z, token_high, blockIdx.y) : nullptr);
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
        float cq[2][4] = {};
        float al[2][4] = {};
        float ab_low = 0.0f;
        float ab_high = 0.0f;
        float aa_low = 0.0f;
        float aa_high = 0.0f;
        const uint32 l_low[2] = {l.low.x, l.low.y};
        const uint32 l_high[2] = {l.high.x, l.high.y};
#pragma unroll
        for (int v = 0; v < 2; ++v) {
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                multiply_rows(cq[v], q, &shared.lk[part][low_rank_result_row(v)][0]);
                multiply_rows(al[v], l, &shared.ll[part][low_rank_result_row(v)][0]);
            }
            const float low0 = unpack_low<Element>(l_low[v]);
            const float low1 = unpack_high<Element>(l_low[v]);
            const float high0 = unpack_low<Element>(l_high[v]);
            const float high1 = unpack_high<Element>(l_high[v]);
            ab_low += low0 * cq[v][0] + low1 * cq[v][1];
            ab_high += high0 * cq[v][2] + high1 * cq[v][3];
            aa_low += low0 * al[v][0] + low1 * al[v][1];
            aa_high += high0 * al[v][2] + high1 * al[v][3];
        }
        const QueryLoss low = query_loss(p.scale * quad_sum(ab_low), quad_sum(aa_low), p.scale * p.scale * quad_sum(bb_low));
        const QueryLoss high =
            query_loss(p.scale * quad_sum(ab_high), quad_sum(aa_high), p.scale * p.scale * quad_sum(bb_high));
        if (valid_low) {
            if (lane % 4 == 0) loss += low.loss;
            const float by_ab = p.gradient_factor * low.by_ab * p.scale;
            const float by_aa = p.gradient_factor * 2.0f * low.by_aa;
            store_row(p.d_q_lr, token_low, by_ab * cq[0][0] + by_aa * al[0][0], by_ab * cq[0][1] + by_aa * al[0][1],
                      by_ab * cq[1][0] + by_aa * al[1][0], by_ab * cq[1][1] + by_aa * al[1][1]);
            const float x[4] = {unpack_low<Element>(l_low[0]), unpack_high<Element>(l_low[0]),
                                unpack_low<Element>(l_low[1]), unpack_high<Element>(l_low[1])};
            store_row(p.by_ab_rows, token_low, by_ab * x[0], by_ab * x[1], by_ab * x[2], by_ab * x[3]);
            store_row(p.by_aa_rows, token_low, by_aa * x[0], by_aa * x[1], by_aa * x[2], by_aa * x[3]);
        }
        if (valid_high) {
            if (lane % 4 == 0) loss += high.loss;
            const float by_ab = p.gradient_factor * high.by_ab * p.scale;
            const float by_aa = p.gradient_factor * 2.0f * high.by_aa;
            store_row(p.d_q_lr, token_high, by_ab * cq[0][2] + by_aa * al[0][2], by_ab * cq[0][3] + by_aa * al[0][3],
                      by_ab * cq[1][2] + by_aa * al[1][2], by_ab * cq[1][3] + by_aa * al[1][3]);
            const float x[4] = {unpack_low<Element>(l_high[0]), unpack_high<Element>(l_high[0]),
                                unpack_low<Element>(l_high[1]), unpack_high<Element>(l_high[1])};
            store_row(p.by_ab_rows, token_high, by_ab * x[0], by_ab * x[1], by_ab * x[2], by_ab * x[3]);
            store_row(p.by_aa_rows, token_high, by_aa * x[0], by_aa * x[1], by_aa * x[2], by_aa * x[3]);
        }
    }
    loss = cta_sum(loss, shared.loss);
    if (threadIdx.x == 0) {
        p.loss[(static_cast<int64>(blockIdx.z) * gridDim.x + blockIdx.x) * p.num_heads + blockIdx.y] = loss;
    }
}
