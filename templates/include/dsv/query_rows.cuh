// What a backward does once for each 64 query rows of a head: before attn_bwd walks them, their statistics and a zeroed
// accumulator of dQ; after it, dQ out of the accumulator. By any number of warps. Knows nothing of lists and tiles of keys.
#pragma once
#include "dsv/attention.cuh"
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

namespace dsv {

constexpr int kQueryRows = 64;

__host__ __device__ constexpr int steps(int pieces, int at_a_time) { return (pieces + at_a_time - 1) / at_a_time; }

struct QueryRows {
    TensorView o;         // [B, Sq, H, D]
    TensorView d_o;       // [B, Sq, H, D]
    TensorView dq;        // [B, Sq, H, D] out
    const float* lse;     // [B, H, Sq]
    const float* d_lse;   // [B, H, Sq], or null
    float* lse_log2;      // [B, H, Sq_padded]
    float* delta;         // [B, H, Sq_padded]
    float* dq_accum;      // [B, H, Sq_padded / 64, D / 8, 128, 4]; null where attn_bwd_dq follows
    uint32* counters;     // [2, B * Hkv] before it: see attn_bwd; null with dq_accum
    int32 distance;       // see attn_bwd
    int32 heads_per_kv;   // H / Hkv
};

// 64 rows of a head.
struct QueryTile {
    uint32 batch, head, tile;

    __device__ __forceinline__ static uint32 tiles(const AttnSizes& sizes) {
        return static_cast<uint32>(sizes.seqlen_q_padded) / kQueryRows;
    }
    // The `index`th of [B, H, Sq_padded / 64].
    __device__ __forceinline__ static QueryTile of(uint32 index, const AttnSizes& sizes) {
        const uint32 slab = index / tiles(sizes);
        return {slab / sizes.num_heads, slab % sizes.num_heads, index % tiles(sizes)};
    }
    __device__ __forceinline__ uint32 slab(const AttnSizes& sizes) const { return batch * sizes.num_heads + head; }
    __device__ __forceinline__ uint32 index(const AttnSizes& sizes) const { return slab(sizes) * tiles(sizes) + tile; }
    // How many of its rows exist; more than 64 where others follow.
    __device__ __forceinline__ int existing(const AttnSizes& sizes) const {
        return sizes.seqlen_q - static_cast<int>(tile * kQueryRows);
    }
    template <typename Element>
    __device__ __forceinline__ Element* row(const TensorView& view, uint32 row) const {
        return view.at<Element>(batch, tile * kQueryRows + row, head);
    }
};

// delta = rowsum(out * d_out) - d_lse and LSE in base 2, padded to whole query tiles so that attn_bwd loads them blindly,
// and zeros for dQ. Empty rows and padding get LSE = +inf: P is 0 there.
template <typename Element, int head_dim, int warps, int unroll>
__device__ __forceinline__ void prepare_rows(const QueryRows& rows, const AttnSizes& sizes, QueryTile at, uint32 warp,
                                             uint32 lane) {
    constexpr int kChunks = head_dim / 8;  // of 16 bytes, one a lane
    // A power of two; at head_dim 96 four of 16 lanes take part in the sum alone.
    constexpr int kLanesPerRow = kChunks <= 8 ? 8 : kChunks <= 16 ? 16 : 32;
    constexpr int kRowsPerWarp = 32 / kLanesPerRow;
    static_assert(head_dim % 8 == 0 && kChunks <= kLanesPerRow, "a row lies within one warp");

    if (rows.dq_accum != nullptr) {
        constexpr int kPieces = kQueryRows * head_dim / 4;
        float4* accum = reinterpret_cast<float4*>(rows.dq_accum + int64{at.index(sizes)} * (kQueryRows * head_dim));
#pragma unroll unroll
        for (int step = 0; step < steps(kPieces, warps * 32); ++step) {
            const uint32 i = (step * warps + warp) * 32 + lane;
            if (kPieces % (warps * 32) == 0 || i < kPieces) accum[i] = make_float4(0, 0, 0, 0);
        }
    }
    // What is the same for all is read once, and pointers go on by whole steps: warps that have few registers call this too.
    const uint32 lane_in_row = lane % kLanesPerRow;
    const uint32 first = warp * kRowsPerWarp + lane / kLanesPerRow;
    const Element* o = at.row<Element>(rows.o, first) + 8 * lane_in_row;
    const Element* d_o = at.row<Element>(rows.d_o, first) + 8 * lane_in_row;
    const uint32 slab = at.slab(sizes), begin = at.tile * kQueryRows;
#pragma unroll unroll
    for (uint32 step = 0; step < steps(kQueryRows, warps * kRowsPerWarp); ++step) {
        const uint32 row = first + step * (warps * kRowsPerWarp);
        const bool exists = begin + row < static_cast<uint32>(sizes.seqlen_q);
        float dot = 0.0f;
        if (exists && row < kQueryRows && lane_in_row < kChunks) {
#pragma unroll unroll
            for (int half = 0; half < 2; ++half) {
                const uint2 x = *reinterpret_cast<const uint2*>(o + 4 * half);
                const uint2 y = *reinterpret_cast<const uint2*>(d_o + 4 * half);
                dot += unpack_low<Element>(x.x) * unpack_low<Element>(y.x);
                dot += unpack_high<Element>(x.x) * unpack_high<Element>(y.x);
                dot += unpack_low<Element>(x.y) * unpack_low<Element>(y.y);
                dot += unpack_high<Element>(x.y) * unpack_high<Element>(y.y);
            }
        }
#pragma unroll
        for (int other = kLanesPerRow / 2; other > 0; other /= 2) dot += __shfl_xor_sync(kFullWarp, dot, other);
        if (lane_in_row == 0 && row < kQueryRows) {
            float lse = kInf;
            float delta = 0.0f;
            if (exists) {
                const float natural = rows.lse[slab * sizes.seqlen_q + begin + row];
                if (natural != -kInf) {
                    lse = natural * kLog2E;
                    delta = dot - (rows.d_lse != nullptr ? rows.d_lse[slab * sizes.seqlen_q + begin + row] : 0.0f);
                }
            }
            rows.lse_log2[slab * sizes.seqlen_q_padded + begin + row] = lse;
            rows.delta[slab * sizes.seqlen_q_padded + begin + row] = delta;
        }
        o += warps * kRowsPerWarp * rows.o.stride_seq;
        d_o += warps * kRowsPerWarp * rows.d_o.stride_seq;
    }
}

// dQ = scale * accumulator, rounded to the input dtype, each element put from the fragment order of attn_bwd into its
// place: group j of 8 columns, thread t and register i of a fragment are row 16 (t / 32) + t % 32 / 4 + 8 (i / 2) and
// column 8 j + 2 (t % 4) + i % 2. Four lanes exchange four groups, so that each has 16 bytes of a row.
template <typename Element, int head_dim, int warps, int unroll>
__device__ __forceinline__ void finish_rows(const QueryRows& rows, const AttnSizes& sizes, QueryTile at, uint32 warp,
                                             uint32 lane) {
    static_assert(head_dim % 32 == 0, "four groups of 8 columns");
    // Of a fragment's 16 rows the upper or lower 8, and 32 columns. What is the same for all is read once: warps that have few
    // registers call this too.
    constexpr int kPieces = 8 * (head_dim / 32);
    const int64 first = int64{at.index(sizes)} * (kQueryRows * head_dim) + 4 * lane;
    const float2* accum = reinterpret_cast<const float2*>(rows.dq_accum + first);
    Element* to = at.row<Element>(rows.dq, lane / 4) + lane % 4 * 8;
    const int left = at.existing(sizes) - static_cast<int>(lane / 4);
#pragma unroll unroll
    for (uint32 piece = warp; piece < kPieces; piece += warps) {
        const uint32 eight = piece % 8, columns = piece / 8;
        uint32 pairs[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 x = __ldcg(accum + columns * 1024 + eight / 2 * 64 + eight % 2 + j * 256);
            pairs[j] = pack2<Element>(x.x * sizes.scale, x.y * sizes.scale);
        }
        transpose_in_four(pairs);
        if (left > static_cast<int>(8 * eight)) {
            Element* row = to + static_cast<int64>(8 * eight) * rows.dq.stride_seq + columns * 32;
            *reinterpret_cast<uint4*>(row) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }
}

}  // namespace dsv
