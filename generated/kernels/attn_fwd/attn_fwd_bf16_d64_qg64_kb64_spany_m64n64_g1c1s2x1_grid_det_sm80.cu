// attn_fwd_bf16_d64_qg64_kb64_spany_m64n64_g1c1s2x1_grid_det_sm80
// Generated from templates/kernels/attn_fwd_sm80.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// attn_fwd, bf16, head_dim 64, query_group 64, kv_block 64, any sparsity, deterministic, sm80;
// block_m 64, block_n 64, groups per CTA 1, consumers 1, stages 2, cluster 1, schedule grid

// out = softmax(scale * Q K^T) V over the keys a query group lists (all keys when kQueryGroup is 0), and
// LSE = ln sum exp(scale * Q K^T): online softmax, m the running row maximum, l the running row sum.
//
// Floors: 4 * pairs * head_dim FLOP at 312 TF (A100), and 4 * head_dim bytes a KV token and CTA from L2; from shared
// memory 4 * head_dim bytes a KV token and warp at 128 bytes a clock: 256 TF with 16 rows a warp, twice that with 32.
// Registers: O head_dim / 2 and S block_n / 2 for each 16 rows of a warp, and about 60 more.
// Shared memory: Q (out in the epilogue) and the ring of K and V.
#include "dsv/attention.cuh"
#include "dsv/fragment.cuh"
#include "dsv/kv_walk.cuh"
#include "dsv/sm80/cp_async.cuh"
#include "dsv/sm80/products.cuh"
#include "dsv/types.cuh"

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kHeadDim = 64;
constexpr int kQueryGroup = 64;  // tokens sharing one list; 0 = dense
constexpr int kKvBlock = 64;        // tokens of one listed unit; 0 = dense
constexpr int kBlockM = 64;
constexpr int kBlockN = 64;
constexpr int kWarps = 4 * 1;
constexpr int kStages = 2;
constexpr int kThreads = 128;
constexpr int kCtasPerSm = 3;
constexpr int kSmemBytes = 40960;
constexpr int kParamsBytes = 208;
// END CONFIG

constexpr bool kDense = kKvBlock == 0;
constexpr int kWarpRows = kBlockM / kWarps;
constexpr int kTilesM = kWarpRows / 16;  // products of 16 query rows side by side: each K and V fragment serves them all
constexpr int kTileBytesQ = kBlockM * kHeadDim * 2;
constexpr int kTileBytesKv = kBlockN * kHeadDim * 2;

static_assert(kThreads == 32 * kWarps, "every warp computes");
static_assert(kWarpRows % 16 == 0, "one mma M is 16 rows");
static_assert(kHeadDim % 64 == 0, "whole 128-byte swizzle columns");
static_assert(kDense || kKvBlock % kBlockN == 0, "a listed block is whole tiles");
static_assert(kDense || kQueryGroup % kBlockM == 0, "a CTA lies within one group");

struct Params {
    dsv::TensorView q;            // [B, Sq, H, D]
    dsv::TensorView k;            // [B, Skv, Hkv, D]
    dsv::TensorView v;            // [B, Skv, Hkv, D]
    dsv::TensorView o;            // [B, Sq, H, D] out
    float* lse;                   // [B, H, Sq] out
    const dsv::int32* q2k_index;  // [B, H, G, max_selected]
    const dsv::int32* q2k_count;  // [B, H, G]
    dsv::int32* error_flag;       // [1]
    dsv::AttnSizes sizes;
};
static_assert(sizeof(Params) == kParamsBytes, "the host's launch parameters have another size");

struct SharedStorage {
    dsv::uint8 q[kTileBytesQ];  // out in the epilogue
    dsv::uint8 k[kStages][kTileBytesKv];
    dsv::uint8 v[kStages][kTileBytesKv];
};
static_assert(sizeof(SharedStorage) == kSmemBytes, "the host asks for other shared memory");

using Walk = dsv::KvWalk<kQueryGroup, kKvBlock, kBlockN>;

// Row statistics of one thread: rows lane / 4 and lane / 4 + 8 of 16.
struct Softmax {
    float row_max[2] = {-dsv::kInf, -dsv::kInf};
    float row_sum[2] = {0.0f, 0.0f};  // this thread's columns only; reduced once at the end

    // S becomes P = exp2(c S - c m); O is scaled to the new maximum.
    __device__ __forceinline__ void step(float (&s)[kBlockN / 2], float (&o)[kHeadDim / 2], float scale_log2) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float m = row_max[r];
#pragma unroll
            for (int j = 0; j < kBlockN / 8; ++j) m = fmaxf(m, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            m = dsv::quad_max(m);
            const float m_log2 = m == -dsv::kInf ? 0.0f : m * scale_log2;
            // The difference first: exactly 1 where the maximum stays, so that hundreds of tiles add no bias to l.
            const float rescale = m == -dsv::kInf ? 1.0f : dsv::exp2_fast((row_max[r] - m) * scale_log2);
            row_max[r] = m;
            float sum = row_sum[r] * rescale;
#pragma unroll
            for (int j = 0; j < kBlockN / 8; ++j) {
#pragma unroll
                for (int i = 2 * r; i < 2 * r + 2; ++i) {
                    s[4 * j + i] = dsv::exp2_fast(s[4 * j + i] * scale_log2 - m_log2);
                    sum += s[4 * j + i];
                }
            }
            row_sum[r] = sum;
#pragma unroll
            for (int j = 0; j < kHeadDim / 8; ++j) {
                o[4 * j + 2 * r] *= rescale;
                o[4 * j + 2 * r + 1] *= rescale;
            }
        }
    }
};

// Grid: (ceil(seqlen_q / kBlockM), H, B), tiles of a head adjacent so that its K and V stay in L2.
extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) attn_fwd_bf16_d64_qg64_kb64_spany_m64n64_g1c1s2x1_grid_det_sm80(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) dsv::uint8 raw[];
    SharedStorage& smem = *reinterpret_cast<SharedStorage*>(raw);
    const int first_row = blockIdx.x * kBlockM, head = blockIdx.y, batch = blockIdx.z;
    const int kv_head = head / (p.sizes.num_heads / p.sizes.num_kv_heads);
    const int lane = threadIdx.x % 32;
    const int warp_row = threadIdx.x / 32 * kWarpRows;
    Walk walk(p.q2k_index, p.q2k_count, p.error_flag, p.sizes, first_row, head, batch);

    float o[kTilesM][kHeadDim / 2];
    Softmax softmax[kTilesM];
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) o[m][i] = 0.0f;
    }

    if (walk.tiles > 0) {
        const Element* keys = p.k.at<const Element>(batch, 0, kv_head);
        const Element* values = p.v.at<const Element>(batch, 0, kv_head);
        int newest = 0;  // first key of the tile of K asked for last: V follows K
        const auto load_keys = [&](int t, int stage) {
            if (t < walk.tiles) {
                newest = walk.tile_start(t);
                dsv::load_tile<Element, kBlockN, kHeadDim, kThreads>(smem.k[stage], keys, p.k.stride_seq, newest,
                                                                     p.sizes.seqlen_kv);
            }
            dsv::copy_commit();
        };
        const auto load_values = [&](int t, int stage) {
            if (t < walk.tiles) {
                dsv::load_tile<Element, kBlockN, kHeadDim, kThreads>(smem.v[stage], values, p.v.stride_seq, newest,
                                                                     p.sizes.seqlen_kv);
            }
            dsv::copy_commit();
        };

        // Groups of copies, in order: K 0 with Q, V 0, K 1, V 1, ... The ring is filled up to K of its last stage.
        dsv::load_tile<Element, kBlockM, kHeadDim, kThreads>(smem.q, p.q.at<const Element>(batch, 0, head), p.q.stride_seq,
                                                             first_row, p.sizes.seqlen_q);
        load_keys(0, 0);
#pragma unroll
        for (int t = 1; t < kStages; ++t) {
            load_values(t - 1, t - 1);
            load_keys(t, t);
        }

        const dsv::LaneView queries = dsv::rows_first(smem.q, warp_row);
        int valid = walk.valid_in_first(p.sizes.seqlen_kv);
        int stage = 0;
#pragma unroll 1
        for (int t = 0; t < walk.tiles; ++t) {
            // This tile's K is there, and V of the tile before has been read by every warp.
            dsv::copy_wait<2 * (kStages - 1)>();
            __syncthreads();
            load_values(t + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);

            float s[kTilesM][kBlockN / 2];
#pragma unroll
            for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
                for (int i = 0; i < kBlockN / 2; ++i) s[m][i] = 0.0f;
            }
            dsv::gemm_rows<Element, kTilesM, kBlockN, kHeadDim, kBlockM, kBlockN>(s, queries,
                                                                                 dsv::chunks_first(smem.k[stage], 0));
            // Only the first listed block can reach past the sequence, with as many tiles as it has.
            if (valid < kBlockN) {
#pragma unroll
                for (int m = 0; m < kTilesM; ++m) dsv::mask_tail<kBlockN>(s[m], valid, -dsv::kInf);
                valid += kBlockN;
            }
            dsv::uint32 probabilities[kTilesM][kBlockN / 16][4];
#pragma unroll
            for (int m = 0; m < kTilesM; ++m) {
                softmax[m].step(s[m], o[m], p.sizes.scale_log2);
                dsv::to_operand<Element, kBlockN>(probabilities[m], s[m]);
            }

            // This tile's V is there, and its K has been read by every warp.
            dsv::copy_wait<2 * (kStages - 1)>();
            __syncthreads();
            load_keys(t + kStages, stage);
            dsv::gemm_columns<Element, kTilesM, kHeadDim, kBlockN, kBlockN>(o, probabilities,
                                                                           dsv::rows_first(smem.v[stage], 0), 0);
            stage = stage == kStages - 1 ? 0 : stage + 1;
        }
    }

    // out = O / l; a row that saw no key keeps zeros and LSE = -inf. A warp's rows of Q are read by itself alone: their
    // room carries out to memory in whole rows.
#pragma unroll
    for (int m = 0; m < kTilesM; ++m) {
        const int row0 = warp_row + 16 * m;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float sum = dsv::quad_sum(softmax[m].row_sum[r]);
            const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
            const int row = first_row + row0 + lane / 4 + 8 * r;
            if (lane % 4 == 0 && row < p.sizes.seqlen_q) {
                const float lse = sum > 0.0f ? softmax[m].row_max[r] * p.sizes.scale + logf(sum) : -dsv::kInf;
                p.lse[(dsv::int64{batch} * p.sizes.num_heads + head) * p.sizes.seqlen_q + row] = lse;
            }
#pragma unroll
            for (int j = 0; j < kHeadDim / 8; ++j) {
                o[m][4 * j + 2 * r] *= inverse;
                o[m][4 * j + 2 * r + 1] *= inverse;
            }
        }
        dsv::uint32 packed[kHeadDim / 16][4];
        dsv::to_operand<Element, kHeadDim>(packed, o[m]);
        __syncwarp();
        dsv::write_fragment<kHeadDim, kBlockM>(smem.q, row0, packed);
    }
    __syncwarp();
    dsv::store_rows<Element, kWarpRows, kHeadDim, kBlockM>(smem.q, warp_row, p.o.at<Element>(batch, 0, head), p.o.stride_seq,
                                                          first_row, p.sizes.seqlen_q);
}
