// gram_query_bf16_d64_r16_v1_sm90a
// Generated from templates/kernels/gram_query.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// gram_query, bf16, rows of 64, rank 16, vector 1, sm90a

// Predictor loss, everything a query contributes, from Gram matrices of the centred keys of its head.
//   G = Kc^T Kc,  C = Lc^T Kc,  A = Lc^T Lc      (Kc, Lc: keys and low-rank keys minus their mean over S)
//   ab = scale l^T C q,  aa = l^T A l,  bb = scale^2 q^T G q      (q: query, l: low-rank query)
//   loss = 0.95 (1 - ab / |a||b|) + 0.05 (|a| / |b| - 1)^2;   d_l = by_ab scale C q + 2 by_aa A l
//   [W | M] = sum of [by_ab scale l q^T | 2 by_aa l l^T] for gram_key: one partial record a CTA, added up by sum_rows
// G and C are kept in f16, as shares of bounds of their entries, and so is q: exact from 6e-5 to 65504, where QK-norm has it.
// Of G there are the blocks on and above the diagonal, those above doubled. Where the keys have most in one direction, a query
// orthogonal to it has a b that is small beside what rounding G does: tiles with such queries add what f16 left of G.
// A is kept as two parts.
// Floors: q and l read once; S (D^2 / 2 + 8 D + 4 R D) products a head. Budget at D = 128, R = 16: W and q in 128 of about 250
// registers; 197 KB, of which 78 are the next tokens of eight warps that wait for nobody; one CTA a multiprocessor.
#include "dsv/gram.cuh"
#include "dsv/operand.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 64;
constexpr int kRank = 16;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kSmemBytes = 103456;
constexpr int kParamsBytes = 144;
// END CONFIG

constexpr int kColumns = kHeadDim + kRank;
constexpr int kStride = padded_stride(kColumns);
constexpr int kRecord = kHeadDim * kColumns + kRank * kRank + kColumns;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocks = kHeadDim / 16;
constexpr int kPairs = kBlocks * (kBlocks + 1) / 2;
// A CTA has 16 rows of W and M, and 128 columns of W, or all if there are fewer; those of a higher rank and head_dim are as many
// CTAs, of which the first has all other results.
constexpr int kSlices = kRank / 16;
constexpr int kColumnSlices = kHeadDim > 128 ? 2 : 1;
constexpr int kOwnBlocks = kBlocks / kColumnSlices;
constexpr int kOwnColumns = 16 * kOwnBlocks + kRank;
constexpr int kRowTiles = kRank == 16 && kHeadDim <= 128 ? 2 : 1;
// With G of 256 columns there is room for one.
constexpr int kStages = kHeadDim <= 128 ? 2 : 1;
constexpr int kRows = 16 * kRowTiles;
static_assert(kHeadDim % 16 == 0 && kRank % 16 == 0, "whole tiles of 16");
static_assert(kThreads == 256, "a thread has the same place in every block of 16 x 16");
constexpr float kCosineWeight = 0.95f;
constexpr float kNormWeight = 0.05f;
// |a|^2 is raised by this share of |b|^2: finite where the prediction is constant over the keys.
constexpr float kNormEpsilon = 1e-6f;
// |b|^2 up to which a query ranks nothing and contributes no gradient.
constexpr float kFlatRow = 1e-10f;
// f16 rounds entries of G by 2^-12 / sqrt(3) at a root mean square: q^T G q by that, |G| (Frobenius) and |q|^2 / D. A row is
// trusted where that is less than 2^-10 of it.
constexpr float kTrusted = 0.145f / kHeadDim;

struct Params {
    TensorView q;           // [B, S, H, D]
    TensorView q_lr;        // [B, S, H, R]; all pointers and strides multiples of 8 elements
    TensorView d_q_lr;      // [B, S, H, R], written
    const float* sums;      // [B, H, record] of gram_sums: K^T [K | L] as [D, D + R], L^T L [R, R], sums of [K | L]
    float* weights;         // [B, H, gridDim.x, R, D + R], written: [W | M] of the CTA's queries
    float* loss;            // [B, gridDim.x, H], written: sum over the CTA's queries
    int32 num_heads;
    int32 seqlen;
    int32 rows_per_cta;     // a multiple of 32
    float scale;
    float gradient_factor;  // of the mean: weight / (B S H)
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::GramQuery");

// 16 columns x 16 inner indices in two parts; each part four 8x8 matrices in ldmatrix's order.
struct Block {
    Element part[2][256];
};

struct SharedStorage {
    alignas(16) Element x[kWarps][kStages][kRows][kStride];  // at last, with kk, [16][kOwnColumns] f32 a warp: W and M
    F16 kk[kPairs][256];                               // row by row, from the diagonal on; a block as a part of Block
    F16 kk_rest[kPairs][256];
    F16 lk[kSlices][kBlocks][256];
    Block ll[kSlices][kSlices];
    float loss[kWarps];
};
static_assert(sizeof(SharedStorage) == kSmemBytes, "SharedStorage differs from Facts");
static_assert(sizeof(SharedStorage::x) + sizeof(SharedStorage::kk) >= kWarps * 16 * kOwnColumns * sizeof(float),
              "the warps' sums take the place of tokens and G");

// Where column n and inner index k of a block lie.
__device__ __forceinline__ int block_offset(int n, int k) { return (n / 8 * 2 + k / 8) * 64 + n % 8 * 8 + k % 8; }

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

// Sums x . d over this lane's columns of a 16 x 16 block: of row l / 4, and of row l / 4 + 8.
template <typename T>
__device__ __forceinline__ void add_dots(float (&sum)[2], const uint32 (&x)[4], const float (&d)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[i % 2] = fmaf(unpack_low<T>(x[i]), d[2 * i], sum[i % 2]);
        sum[i % 2] = fmaf(unpack_high<T>(x[i]), d[2 * i + 1], sum[i % 2]);
    }
}

__device__ __forceinline__ void to_half(uint32 (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = pack2<F16>(unpack_low<Element>(x[i]), unpack_high<Element>(x[i]));
}

// Of the rows that four lanes share, of which each has a part of the sum, the one that is this lane's own: of lane c of the four
// token l / 4 + 8 (c % 2) of tile c / 2.
__device__ __forceinline__ float own_row(const float (&x)[kRowTiles][2]) {
    float row = 0.0f;
#pragma unroll
    for (int own = 0; own < 2 * kRowTiles; ++own) {
        const float sum = quad_sum(x[own / 2][own % 2]);
        if (lane_index() % 4 == own) row = sum;
    }
    return row;
}

// This lane's part of the rows' squares, in f16: to know how large they are. Infinite where that is too small a type.
__device__ __forceinline__ void add_squares(float (&sum)[2], const uint32 (&x)[kBlocks][4]) {
    uint32 squares[2] = {};
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            asm("fma.rn.f16x2 %0, %1, %1, %0;" : "+r"(squares[r % 2]) : "r"(x[i][r]));
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += unpack_low<F16>(squares[r]) + unpack_high<F16>(squares[r]);
}

// A^T of 16 tokens, each times its factor: lane 4 r + own has that of token r, lane 4 r + own + 1 that of token r + 8.
__device__ __forceinline__ void scale_tokens(uint32 (&to)[4], const uint32 (&a)[4], float mine, int own) {
    const int from = 8 * (lane_index() % 4) + own;
    const float factor[2][2] = {
        {__shfl_sync(kFullWarp, mine, from), __shfl_sync(kFullWarp, mine, from + 4)},
        {__shfl_sync(kFullWarp, mine, from + 1), __shfl_sync(kFullWarp, mine, from + 5)},
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        to[i] = pack2<Element>(factor[i / 2][0] * unpack_low<Element>(a[i]), factor[i / 2][1] * unpack_high<Element>(a[i]));
    }
}

// What f16 entries of G and C are to be multiplied by, powers of two; and the Frobenius norm of G's entries.
struct Units {
    float kk;
    float lk;
    float norm;
};

// The power of two above x.
__device__ __forceinline__ float power_above(float x) { return x > 0.0f ? ldexpf(1.0f, ilogbf(x) + 1) : 1.0f; }

// Sums x y minus (sum x)(sum y) / S.
__device__ __forceinline__ Units centre(const float* sums, SharedStorage& shared, float per_token) {
    const float* low = sums + kHeadDim * kColumns;
    const float* sum = low + kRank * kRank;
    const auto centred = [&](float x, int i, int j) { return x - __ldg(sum + i) * (__ldg(sum + j) * per_token); };
    // No entry is larger than the largest of the diagonal, or than the root of two such.
    float largest_kk = 0.0f;
    float largest_ll = 0.0f;
    for (int i = lane_index(); i < kHeadDim; i += 32) {
        largest_kk = fmaxf(largest_kk, centred(__ldg(sums + i * (kColumns + 1)), i, i));
    }
    for (int i = lane_index(); i < kRank; i += 32) {
        largest_ll = fmaxf(largest_ll, centred(__ldg(low + i * (kRank + 1)), kHeadDim + i, kHeadDim + i));
    }
    largest_kk = warp_max(largest_kk);
    largest_ll = warp_max(largest_ll);
    Units unit = {power_above(largest_kk), power_above(sqrtf(largest_kk) * sqrtf(largest_ll)), 0.0f};

    // Neighbouring threads read neighbouring floats; G and A are symmetric.
    const int row = threadIdx.x / 16;
    const int column = threadIdx.x % 16;
    const int at = block_offset(column, row);
    const float per_kk = 1.0f / unit.kk;
    const float per_lk = 1.0f / unit.lk;
    int i = 0;
    int j = 0;
#pragma unroll 6
    for (int pair = 0; pair < kPairs; ++pair) {
        // Column block i, inner block j.
        const float x = centred(__ldg(sums + (16 * j + row) * kColumns + 16 * i + column), 16 * j + row, 16 * i + column);
        const float entry = (i == j ? per_kk : 2.0f * per_kk) * x;
        split(entry, shared.kk[pair][at], shared.kk_rest[pair][at]);
        unit.norm += (i == j ? 1.0f : 0.5f) * entry * entry;
        if (++j == kBlocks) j = ++i;
    }
#pragma unroll
    for (int n = 0; n < kSlices; ++n) {
        const int n0 = kHeadDim + 16 * n;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
            const float x = centred(__ldg(sums + (16 * j + row) * kColumns + n0 + column), 16 * j + row, n0 + column);
            shared.lk[n][j][at] = from_float<F16>(per_lk * x);
        }
#pragma unroll
        for (int j = 0; j < kSlices; ++j) {
            const float x = centred(__ldg(low + (16 * j + row) * kRank + 16 * n + column), kHeadDim + 16 * j + row, n0 + column);
            split(x, shared.ll[n][j].part[0][at], shared.ll[n][j].part[1][at]);
        }
    }
    unit.norm = sqrtf(cta_sum(unit.norm, shared.loss));
    return unit;
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) gram_query_bf16_d64_r16_v1_sm90a(const __grid_constant__ Params p) {
    extern __shared__ uint4 dynamic[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(dynamic);
    const int lane = lane_index();
    const int warp = warp_index();
    const int batch = blockIdx.z / (kSlices * kColumnSlices);
    const int slice = blockIdx.z / kColumnSlices % kSlices;
    const int own_block = blockIdx.z % kColumnSlices * kOwnBlocks;
    const bool is_first = slice == 0 && own_block == 0;
    const int64 head = static_cast<int64>(batch) * p.num_heads + blockIdx.y;
    const int begin = blockIdx.x * p.rows_per_cta;
    const int end = min(begin + p.rows_per_cta, p.seqlen);
    const int tiles = (end - begin + kRows - 1) / kRows;
    const Element* q_head = p.q.at<const Element>(batch, 0, blockIdx.y);
    const Element* l_head = p.q_lr.at<const Element>(batch, 0, blockIdx.y);
    const auto copy = [&](int tile, int stage) {
        if (tile < tiles) {
            const int first = begin + tile * kRows;
            auto& to = shared.x[warp][stage];
            // gram_key finds in L2 what gram_sums read last, if the queries do not take its place.
            copy_columns<kHeadDim, 32, true>(to, 0, lane, q_head, p.q.stride_seq, first, p.seqlen);
            copy_columns<kRank, 32>(to, kHeadDim, lane, l_head, p.q_lr.stride_seq, first, p.seqlen);
        }
        copy_commit();
    };
    copy(warp, 0);
    const Units unit = centre(p.sums + head * kRecord, shared, 1.0f / static_cast<float>(p.seqlen));
    __syncthreads();

    // Two operands of 16 columns and 16 inner indices in one: registers 0, 1 of the first eight columns, 2, 3 of the others.
    const auto load_block = [&](uint32 (&b)[4], const auto& block) { load_matrices(b, smem_address(&block[8 * lane])); };
    float loss = 0.0f;
    float w[kOwnBlocks][8] = {};
    float m[kSlices][8] = {};
    for (int tile = warp; tile < tiles; tile += kWarps) {
        const int stage = tile / kWarps % kStages;
        if constexpr (kStages == 2) copy(tile + kWarps, stage ^ 1);
        copy_wait<kStages - 1>();
        __syncwarp();
        const uint32 x = smem_address(&shared.x[warp][stage][0][0]);
        const uint32 by_rows = x + sizeof(Element) * rows_first_offset<kStride>();
        const uint32 by_chunks = x + sizeof(Element) * chunks_first_offset<kStride>();
        constexpr uint32 kTileBytes = 16 * kStride * sizeof(Element);
        constexpr uint32 kLowBytes = kHeadDim * sizeof(Element);

        uint32 q[kRowTiles][kBlocks][4];
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
            for (int i = 0; i < kBlocks; ++i) {
                load_matrices(q[t][i], by_rows + t * kTileBytes + 32 * i);
                to_half(q[t][i]);
            }
        }
        float bb[kRowTiles][2] = {};
        float qq[kRowTiles][2] = {};
        int pair = 0;
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) {
            float d[kRowTiles][8] = {};
#pragma unroll
            for (int j = i; j < kBlocks; ++j, ++pair) {
                uint32 b[4];
                load_block(b, shared.kk[pair]);
#pragma unroll
                for (int t = 0; t < kRowTiles; ++t) multiply<F16>(d[t], q[t][j], b);
            }
#pragma unroll
            for (int t = 0; t < kRowTiles; ++t) add_dots<F16>(bb[t], q[t][i], d[t]);
        }
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) add_squares(qq[t], q[t]);

        uint32 l[kRowTiles][kSlices][4];
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
            for (int n = 0; n < kSlices; ++n) load_matrices(l[t][n], by_rows + t * kTileBytes + kLowBytes + 32 * n);
        }
        float cq[kRowTiles][kSlices][8] = {};
        float al[kRowTiles][kSlices][8] = {};
        float ab[kRowTiles][2] = {};
        float aa[kRowTiles][2] = {};
#pragma unroll
        for (int n = 0; n < kSlices; ++n) {
            uint32 b[4];
#pragma unroll
            for (int j = 0; j < kBlocks; ++j) {
                load_block(b, shared.lk[n][j]);
#pragma unroll
                for (int t = 0; t < kRowTiles; ++t) multiply<F16>(cq[t][n], q[t][j], b);
            }
#pragma unroll
            for (int j = 0; j < kSlices; ++j) {
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    load_block(b, shared.ll[n][j].part[part]);
#pragma unroll
                    for (int t = 0; t < kRowTiles; ++t) multiply<Element>(al[t][n], l[t][j], b);
                }
            }
#pragma unroll
            for (int t = 0; t < kRowTiles; ++t) {
                add_dots<Element>(ab[t], l[t][n], cq[t][n]);
                add_dots<Element>(aa[t], l[t][n], al[t][n]);
            }
        }

        float row_bb = own_row(bb);
        if (__any_sync(kFullWarp, row_bb < kTrusted * unit.norm * own_row(qq))) {
            // Seldom: with q read again, block by block, so that no register is kept for it.
            const auto load_query = [&](uint32 (&to)[4], int t, int block) {
                load_matrices(to, by_rows + t * kTileBytes + 32 * block);
                to_half(to);
            };
            int rest = 0;
#pragma unroll 1
            for (int i = 0; i < kBlocks; ++i) {
                float d[kRowTiles][8] = {};
                uint32 x[4];
#pragma unroll 1
                for (int j = i; j < kBlocks; ++j, ++rest) {
                    uint32 b[4];
                    load_block(b, shared.kk_rest[rest]);
#pragma unroll
                    for (int t = 0; t < kRowTiles; ++t) {
                        load_query(x, t, j);
                        multiply<F16>(d[t], x, b);
                    }
                }
#pragma unroll
                for (int t = 0; t < kRowTiles; ++t) {
                    load_query(x, t, i);
                    add_dots<F16>(bb[t], x, d[t]);
                }
            }
            row_bb = own_row(bb);
        }
        const float row_ab = own_row(ab);
        const float row_aa = own_row(aa);
        // No row: |b| is zero.
        const QueryLoss row = query_loss(p.scale * unit.lk * row_ab, row_aa, p.scale * p.scale * unit.kk * row_bb);
        loss += row.loss;
        const float row_by_ab = p.gradient_factor * row.by_ab * p.scale;
        const float row_by_aa = p.gradient_factor * 2.0f * row.by_aa;
#pragma unroll
        for (int own = 0; own < 2 * kRowTiles; ++own) {
            const float by_ab = unit.lk * __shfl_sync(kFullWarp, row_by_ab, own, 4);
            const float by_aa = __shfl_sync(kFullWarp, row_by_aa, own, 4);
            const int token = begin + tile * kRows + 8 * own + lane / 4;
            if (token < p.seqlen && is_first) {
                Element* to = p.d_q_lr.at<Element>(batch, token, blockIdx.y) + 2 * (lane % 4);
#pragma unroll
                for (int i = 0; i < 2 * kSlices; ++i) {
                    const int at = 4 * (i % 2) + 2 * (own % 2);
                    const float(&c)[8] = cq[own / 2][i / 2];
                    const float(&a)[8] = al[own / 2][i / 2];
                    *reinterpret_cast<uint32*>(to + 8 * i) =
                        pack2<Element>(by_ab * c[at] + by_aa * a[at], by_ab * c[at + 1] + by_aa * a[at + 1]);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
            // The same tokens as inner indices.
            uint32 low[4];
            load_matrices_transposed(low, by_chunks + t * kTileBytes + kLowBytes + 32 * slice);
            uint32 weighted[4];
            scale_tokens(weighted, low, row_by_ab, 2 * t);
            uint32 b[4];
#pragma unroll
            for (int i = 0; i < kOwnBlocks; ++i) {
                load_matrices_transposed(b, by_rows + t * kTileBytes + 32 * (own_block + i));
                multiply<Element>(w[i], weighted, b);
            }
            scale_tokens(weighted, low, row_by_aa, 2 * t);
#pragma unroll
            for (int i = 0; i < kSlices; ++i) {
                load_matrices_transposed(b, by_rows + t * kTileBytes + kLowBytes + 32 * i);
                multiply<Element>(m[i], weighted, b);
            }
        }
        // Whoever reads this stage is done before the next copy into it.
        __syncwarp();
        if constexpr (kStages == 1) copy(tile + kWarps, 0);
    }

    // The warps' sums, in order.
    copy_wait<0>();
    __syncthreads();
    float* sums = reinterpret_cast<float*>(&shared.x[0][0][0][0]);
    {
        float* mine = sums + warp * 16 * kOwnColumns + lane / 4 * kOwnColumns + 2 * (lane % 4);
        const auto put = [&](int column, const float(&d)[8]) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                *reinterpret_cast<float2*>(mine + i % 2 * 8 * kOwnColumns + column + i / 2 * 8) = {d[2 * i], d[2 * i + 1]};
            }
        };
#pragma unroll
        for (int i = 0; i < kOwnBlocks; ++i) put(16 * i, w[i]);
#pragma unroll
        for (int i = 0; i < kSlices; ++i) put(16 * kOwnBlocks + 16 * i, m[i]);
    }
    loss = cta_sum(loss, shared.loss);
    float* to = p.weights + ((head * gridDim.x + blockIdx.x) * kRank + 16 * slice) * kColumns;
    for (int i = threadIdx.x; i < 16 * kOwnColumns; i += kThreads) {
        float total = sums[i];
#pragma unroll
        for (int other = 1; other < kWarps; ++other) total += sums[other * 16 * kOwnColumns + i];
        const int column = i % kOwnColumns;
        if (column < 16 * kOwnBlocks) {
            to[i / kOwnColumns * kColumns + 16 * own_block + column] = total;
        } else if (own_block == 0) {
            to[i / kOwnColumns * kColumns + kHeadDim + column - 16 * kOwnBlocks] = total;
        }
    }
    if (threadIdx.x == 0 && is_first) {
        p.loss[(static_cast<int64>(batch) * gridDim.x + blockIdx.x) * p.num_heads + blockIdx.y] = loss;
    }
}
