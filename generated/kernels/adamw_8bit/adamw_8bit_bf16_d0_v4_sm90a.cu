// adamw_8bit_bf16_d0_v4_sm90a
// Generated from templates/kernels/adamw_8bit.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// adamw_8bit, bf16, vector 4, sm90a

// AdamW with moments of eight bits; in f32, step by step as dsv_reference::layers::eight_bits, which says why it is stable:
//   m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w = keep w - size m / (root sqrt(v) + eps)
// 128 neighbours share an f32 scale, the largest |m| (or v) among them; a code is a float of 3 bits of mantissa relative to
// it, 4 bits of exponent and a sign for m, 5 for v, so that (code + base) << 20 is its f32. Rounding between two codes goes by
// a hash of step and element. A factor that is not finite leaves everything as it is.
// A warp per 128 values. Floor: 18.1 bytes of HBM a weight (grad read; w and the codes read and written; copy written).
#include "dsv/types.cuh"
#include "dsv/vector.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
using Element = dsv::Bf16;
constexpr int kVector = 4;
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 112;
// END CONFIG

constexpr int kBlock = 32 * kVector;  // values that share a scale
static_assert(kBlock == 128, "differs from dsv_reference::layers::eight_bits::BLOCK");
constexpr float kSmallestScale = __builtin_bit_cast(float, (127u - 90u) << 23);

struct Params {
    float* master;             // [count], updated
    uint8* codes1;             // [count], first moment, updated
    float* scales1;            // [count / 128], updated
    uint8* codes2;             // [count], second moment, updated
    float* scales2;            // [count / 128], updated
    const float* grad;         // [count]
    Element* weight;           // [count], written: master rounded
    const float* grad_factor;  // [1]
    int64 count;               // multiple of 128
    int64 first;               // number of element 0 in its set
    float keep;                // 1 - lr decay
    float size;                // lr / (1 - beta1^step)
    float root;                // 1 / sqrt(1 - beta2^step)
    float beta1;
    float beta2;
    float eps;
    uint32 seed;  // of this step's thresholds
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::AdamW8");

// The first moment: a sign and 4 bits of exponent; the second: 5 bits.
struct First {
    static constexpr bool kSigned = true;
    static constexpr uint32 kBase = (127u << 3) - (15u << 3);
};
struct Second {
    static constexpr bool kSigned = false;
    static constexpr uint32 kBase = (127u << 3) - (31u << 3);
};

template <typename Moment>
__device__ __forceinline__ float value_of(uint32 code) {
    const uint32 size = Moment::kSigned ? code & 0x7fu : code;
    const uint32 sign = Moment::kSigned ? (code >> 7) << 31 : 0u;
    return __uint_as_float((size == 0 ? 0u : (size + Moment::kBase) << 20) | sign);
}

// `value` from -1 to 1; the larger of two codes where `threshold`, 16 bits, is below the share of the way to it.
template <typename Moment>
__device__ __forceinline__ uint32 code_of(float value, uint32 threshold) {
    constexpr uint32 kSmallest = (Moment::kBase + 1) << 20;
    const uint32 bits = __float_as_uint(value) & 0x7fffffffu;
    uint32 size;
    if (bits >= kSmallest) {
        size = (bits >> 20) + (threshold < ((bits >> 4) & 0xffffu)) - Moment::kBase;
    } else if (Moment::kSigned) {
        const float way = __fmul_rn(__fdiv_rn(__uint_as_float(bits), __uint_as_float(kSmallest)), 65536.0f);
        size = static_cast<float>(threshold) < way;
    } else {
        size = bits > 0;  // never 0: updates are divided by its root
    }
    return Moment::kSigned && size > 0 ? size | ((__float_as_uint(value) >> 24) & 0x80u) : size;
}

// MurmurHash3's finaliser.
__device__ __forceinline__ uint32 mixed(uint32 x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

__device__ __forceinline__ float relative(float value, float scale) { return scale > 0.0f ? __fdiv_rn(value, scale) : 0.0f; }

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) adamw_8bit_bf16_d0_v4_sm90a(const __grid_constant__ Params p) {
    const float factor = *p.grad_factor;
    if (!(fabsf(factor) < kInf)) return;
    const int64 warps = static_cast<int64>(gridDim.x) * (kThreads / 32);
    for (int64 block = static_cast<int64>(blockIdx.x) * (kThreads / 32) + warp_index(); block < p.count / kBlock; block += warps) {
        const int64 first = block * kBlock + lane_index() * kVector;
        float w[kVector], g[kVector], m[kVector], v[kVector];
        load_vector(p.master + first, w);
        load_vector(p.grad + first, g);
        const uint32 old1 = *reinterpret_cast<const uint32*>(p.codes1 + first);
        const uint32 old2 = *reinterpret_cast<const uint32*>(p.codes2 + first);
        const float before1 = p.scales1[block];
        const float before2 = p.scales2[block];
        float most1 = 0.0f;
        float most2 = 0.0f;
    #pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const float scaled = __fmul_rn(g[i], factor);
            const float old_m = __fmul_rn(value_of<First>((old1 >> (8 * i)) & 0xffu), before1);
            const float old_v = __fmul_rn(value_of<Second>((old2 >> (8 * i)) & 0xffu), before2);
            m[i] = __fmaf_rn(p.beta1, old_m, __fmul_rn(1.0f - p.beta1, scaled));
            v[i] = __fmaf_rn(p.beta2, old_v, __fmul_rn(__fmul_rn(1.0f - p.beta2, scaled), scaled));
            const float update = __fdiv_rn(__fmul_rn(p.size, m[i]), __fmaf_rn(__fsqrt_rn(v[i]), p.root, p.eps));
            w[i] = __fmaf_rn(w[i], p.keep, -update);
            most1 = fmaxf(most1, fabsf(m[i]));
            most2 = fmaxf(most2, v[i]);
        }
        store_vector(p.master + first, w);
        store_vector(p.weight + first, w);
        most1 = warp_max(most1);
        most2 = warp_max(most2);
        const float scale1 = most1 < kSmallestScale ? 0.0f : most1;
        const float scale2 = most2 < kSmallestScale ? 0.0f : most2;
        uint32 new1 = 0;
        uint32 new2 = 0;
    #pragma unroll
        for (int i = 0; i < kVector; ++i) {
            const uint64 element = static_cast<uint64>(p.first + first + i);
            const uint32 hash = mixed(p.seed ^ (static_cast<uint32>(element) * 0x9e3779b1u) ^ static_cast<uint32>(element >> 32));
            new1 |= code_of<First>(relative(m[i], scale1), hash & 0xffffu) << (8 * i);
            new2 |= code_of<Second>(relative(v[i], scale2), hash >> 16) << (8 * i);
        }
        *reinterpret_cast<uint32*>(p.codes1 + first) = new1;
        *reinterpret_cast<uint32*>(p.codes2 + first) = new2;
        if (lane_index() == 0) {
            p.scales1[block] = scale1;
            p.scales2[block] = scale2;
        }
    }
}
