// gram_sums_bf16_d256_r16_v1_sm90a
// Generated from templates/kernels/gram_sums.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// gram_sums, bf16, rows of 256, rank 16, vector 1, sm90a

// Predictor loss, the sums over the keys of a head: of rows x = [k | l] (keys and low-rank keys), in f32,
//   K^T K, K^T L, L^T L and the column sums of K and L,
// one partial record a CTA, of a chunk of tokens; sum_rows adds the records up, so the bits are the same on every run.
// Floors: k and l read once; S (D (D + R) + R^2) products a head.
// A warp has 32 rows (16 at D = 64) of K^T [K | L], and half of its columns. Tokens come through four stages of 64 by cp.async.
// At D = 256 two CTAs share a chunk: each reads all of it and has half of K^T's rows, and the first L^T L.
// Budget at D = 128, R = 16: 80 of 128 registers are sums; 78 KB, of which 55 are in flight; two CTAs a multiprocessor.
#include "dsv/gram.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 256;
constexpr int kRank = 16;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kSmemBytes = 143360;
constexpr int kParamsBytes = 88;
// END CONFIG

constexpr int kColumns = kHeadDim + kRank;
constexpr int kStride = padded_stride(kColumns);
constexpr int kRecord = kHeadDim * kColumns + kRank * kRank + kColumns;
constexpr int kWarps = kThreads / 32;
constexpr int kStages = 4;
constexpr int kRows = 64;
// A warp's rows of the product in tiles of 16, and its columns in blocks of 16: the first or the second half of them.
constexpr int kRowTiles = kHeadDim > 64 ? 2 : 1;
// CTAs that share a chunk of tokens.
constexpr int kSlices = kHeadDim > 128 ? 2 : 1;
constexpr int kRowGroups = kHeadDim / kSlices / (16 * kRowTiles);
constexpr int kBlocks = kColumns / 16;
constexpr int kFirstHalf = (kBlocks + 1) / 2;
constexpr int kLowBlocks = kRank / 16;
static_assert(kHeadDim % (16 * kRowTiles * kSlices) == 0 && kRank % 16 == 0, "whole tiles of 16");
static_assert(2 * kRowGroups <= kWarps && kLowBlocks <= kWarps - kRowGroups, "every tile has its warp");

struct Params {
    TensorView k;     // [B, S, H, D]
    TensorView k_lr;  // [B, S, H, R]; all pointers and strides multiples of 8 elements
    float* partial;   // [B, H, gridDim.x, record], written: K^T [K | L] as [D, D + R], L^T L [R, R], sums of [K | L]
    int32 num_heads;
    int32 seqlen;
    int32 rows_per_cta;  // a multiple of 64
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::GramSums");

struct SharedStorage {
    alignas(16) Element x[kStages][kRows][kStride];
};
static_assert(sizeof(SharedStorage) == kSmemBytes, "SharedStorage differs from Facts");

// A 16 x 16 block of results to rows of `stride` floats.
__device__ __forceinline__ void store_block(float* to, int stride, const float (&d)[8]) {
    float* at = to + lane_index() / 4 * stride + 2 * (lane_index() % 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(at + 8 * half) = {d[4 * half], d[4 * half + 1]};
        *reinterpret_cast<float2*>(at + 8 * stride + 8 * half) = {d[4 * half + 2], d[4 * half + 3]};
    }
}

__device__ __forceinline__ void store_sums(float* to, const float (&d)[4]) {
    if (lane_index() % 4 == 0) {
        to[lane_index() / 4] = d[0];
        to[lane_index() / 4 + 8] = d[2];
    }
}

// A warp's share of all tiles: `last` - `first` column blocks of the product with K's rows, and in the second half the column
// sums of K; the last warps of it, which have the fewest columns or none, take the products of L with itself. A function of
// its own for each half, so that no registers are kept for what a warp does not have.
template <bool second>
__device__ __forceinline__ void sum_products(const Params& p, SharedStorage& shared) {
    constexpr int kFirst = second ? kFirstHalf : 0;
    constexpr int kCount = second ? kBlocks - kFirstHalf : kFirstHalf;
    constexpr int kStepBytes = 16 * kStride * sizeof(Element);
    const int batch = blockIdx.z / kSlices;
    const int slice = blockIdx.z % kSlices;
    const int begin = blockIdx.x * p.rows_per_cta;
    const int end = min(begin + p.rows_per_cta, p.seqlen);
    const int tiles = (end - begin + kRows - 1) / kRows;
    // Every thread ends a group a tile, were it empty, so that groups count tiles.
    const auto copy = [&](int tile) {
        if (tile < tiles) {
            const int first = begin + tile * kRows;
            auto& to = shared.x[tile % kStages];
            const Element* k = p.k.at<const Element>(batch, 0, blockIdx.y);
            const Element* l = p.k_lr.at<const Element>(batch, 0, blockIdx.y);
            copy_columns<kHeadDim, kThreads>(to, 0, threadIdx.x, k, p.k.stride_seq, first, p.seqlen);
            copy_columns<kRank, kThreads>(to, kHeadDim, threadIdx.x, l, p.k_lr.stride_seq, first, p.seqlen);
        }
        copy_commit();
    };
#pragma unroll
    for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);

    const int warp = warp_index();
    const int row_tile = (slice * kRowGroups + warp % kRowGroups) * kRowTiles;
    const bool has_rows = warp / kRowGroups < 2;
    const int low_block = second && slice == 0 ? kWarps - 1 - warp : kLowBlocks;
    float kx[kRowTiles][kCount][8] = {};
    float sum_k[kRowTiles][4] = {};
    float ll[kLowBlocks][8] = {};
    float sum_l[4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
        copy_wait<kStages - 2>();
        __syncthreads();
        copy(tile + kStages - 1);
        const uint32 x = smem_address(&shared.x[tile % kStages][0][0]);
        const uint32 as_a = x + sizeof(Element) * chunks_first_offset<kStride>();
        const uint32 as_b = x + sizeof(Element) * rows_first_offset<kStride>();
        if (has_rows) {
#pragma unroll 2
            for (int step = 0; step < kRows / 16; ++step) {
                uint32 a[kRowTiles][4];
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m) {
                    load_matrices_transposed(a[m], as_a + step * kStepBytes + 32 * (row_tile + m));
                    if constexpr (second) add_rows<Element>(sum_k[m], a[m]);
                }
#pragma unroll
                for (int block = 0; block < kCount; ++block) {
                    uint32 b[4];
                    load_matrices_transposed(b, as_b + step * kStepBytes + 32 * (kFirst + block));
#pragma unroll
                    for (int m = 0; m < kRowTiles; ++m) multiply<Element>(kx[m][block], a[m], b);
                }
            }
        }
        if (low_block < kLowBlocks) {
#pragma unroll 2
            for (int step = 0; step < kRows / 16; ++step) {
                uint32 a[4];
                load_matrices_transposed(a, as_a + step * kStepBytes + 32 * (kHeadDim / 16 + low_block));
                add_rows<Element>(sum_l, a);
#pragma unroll
                for (int n = 0; n < kLowBlocks; ++n) {
                    uint32 b[4];
                    load_matrices_transposed(b, as_b + step * kStepBytes + 32 * (kHeadDim / 16 + n));
                    multiply<Element>(ll[n], a, b);
                }
            }
        }
    }

    const int64 head = static_cast<int64>(batch) * p.num_heads + blockIdx.y;
    float* record = p.partial + (head * gridDim.x + blockIdx.x) * kRecord;
    float* low = record + kHeadDim * kColumns;
    float* sums = low + kRank * kRank;
    if (has_rows) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            const int row = 16 * (row_tile + m);
#pragma unroll
            for (int block = 0; block < kCount; ++block) {
                store_block(record + row * kColumns + 16 * (kFirst + block), kColumns, kx[m][block]);
            }
            if constexpr (second) store_sums(sums + row, sum_k[m]);
        }
    }
    if (low_block < kLowBlocks) {
#pragma unroll
        for (int n = 0; n < kLowBlocks; ++n) store_block(low + 16 * low_block * kRank + 16 * n, kRank, ll[n]);
        store_sums(sums + kHeadDim + 16 * low_block, sum_l);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) gram_sums_bf16_d256_r16_v1_sm90a(const __grid_constant__ Params p) {
    extern __shared__ uint4 dynamic[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(dynamic);
    if (warp_index() < kRowGroups) {
        sum_products<false>(p, shared);
    } else {
        sum_products<true>(p, shared);
    }
}
