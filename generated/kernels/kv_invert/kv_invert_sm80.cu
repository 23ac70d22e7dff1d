// kv_invert_sm80
// Generated from templates/kernels/kv_invert.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// kv_invert, sm80

// Inverts KV lists: k2q(n) = groups g, ascending, whose list q2k(g) names KV block n; CSR per (batch, head).
//   offset(n) = sum over m < n of |k2q(m)|, relative to the (batch, head) slab; offset(N) = number of entries
// A CTA owns 64 KV blocks: one pass over all lists counts the entries below its range (its offset) and sets one bit
// per (block, group) in its range; popcounts of bit rows are the counts, set bits read in order are the lists.
// No cursor and no atomic add, so the result is the same bits every time.
// Floor: every list is read ceil(N / 64) times through L2. Budget: 8 B of shared memory a group and 64 blocks.
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 64;
// END CONFIG

constexpr int kBlocksPerCta = 64;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads % 32 == 0 && kThreads >= kBlocksPerCta, "whole warps; a thread for every block's offset");

struct Params {
    const int32* q2k_index;  // [B, H, G, max_selected]
    const int32* q2k_count;  // [B, H, G]
    int32* k2q_offset;       // [B, H, N + 1], written
    int32* k2q_index;        // [B, H, G * max_selected], written up to offset[N]
    int32* error_flag;       // [1]
    int32 batch;
    int32 num_heads;
    int32 num_groups;
    int32 num_kv_blocks;
    int32 max_selected;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::KvInvert");

struct SharedStorage {
    int32 sums[kWarps];
    int32 counts[kBlocksPerCta];
    int32 offsets[kBlocksPerCta + 1];
};

// Word of block row `row` that holds groups 32 word .. 32 word + 31; rows are rotated against each other so that one
// group's bits in 32 rows fall into 32 banks.
__device__ __forceinline__ int word_at(int row, int word, int words) { return row * words + (word + row) % words; }

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) kv_invert_sm80(const __grid_constant__ Params p) {
    extern __shared__ uint32 sBits[];  // [64][ceil(G / 32)], rows rotated
    __shared__ SharedStorage shared;
    const int lane = lane_index();
    const int warp = warp_index();
    const int words = (p.num_groups + 31) / 32;
    const int block0 = blockIdx.x * kBlocksPerCta;
    const int blocks = min(kBlocksPerCta, p.num_kv_blocks - block0);
    const int64 head = static_cast<int64>(blockIdx.z) * p.num_heads + blockIdx.y;
    const int64 slab = head * p.num_groups * p.max_selected;
    int32 errors = 0;

    for (int i = threadIdx.x; i < kBlocksPerCta * words; i += kThreads) sBits[i] = 0;
    __syncthreads();

    int below = 0;
    int inside = 0;
    for (int group = warp; group < p.num_groups; group += kWarps) {
        int count = p.q2k_count[head * p.num_groups + group];
        if (count < 0 || count > p.max_selected) {
            errors |= kCountOutOfRange;
            count = min(max(count, 0), p.max_selected);
        }
        const int32* list = p.q2k_index + slab + static_cast<int64>(group) * p.max_selected;
        for (int i = lane; i < count; i += 32) {
            const int block = list[i];
            if (block < 0 || block >= p.num_kv_blocks) {
                errors |= kIndexOutOfRange;  // dropped, by every CTA alike
            } else if (block < block0) {
                ++below;
            } else if (block < block0 + blocks) {
                ++inside;
                atomicOr(&sBits[word_at(block - block0, group / 32, words)], 1u << (group % 32));
            }
        }
    }
    below = cta_sum(below, shared.sums);
    inside = cta_sum(inside, shared.sums);

    for (int row = warp; row < kBlocksPerCta; row += kWarps) {
        int count = 0;
        for (int word = lane; word < words; word += 32) count += __popc(sBits[row * words + word]);
        count = warp_sum(count);
        if (lane == 0) shared.counts[row] = count;
    }
    __syncthreads();
    if (warp == 0) {
        const int first = shared.counts[lane];
        const int second = shared.counts[lane + 32];
        const int through_first = warp_inclusive_sum(first);
        const int half = __shfl_sync(kFullWarp, through_first, 31);
        const int through_second = half + warp_inclusive_sum(second);
        shared.offsets[lane] = below + through_first - first;
        shared.offsets[lane + 32] = below + through_second - second;
        if (lane == 31) shared.offsets[kBlocksPerCta] = below + through_second;
    }
    __syncthreads();

    int32* offsets = p.k2q_offset + head * (p.num_kv_blocks + 1) + block0;
    if (static_cast<int>(threadIdx.x) < blocks) offsets[threadIdx.x] = shared.offsets[threadIdx.x];
    if (threadIdx.x == 0 && block0 + blocks == p.num_kv_blocks) offsets[blocks] = below + inside;

    for (int row = warp; row < blocks; row += kWarps) {
        int32* list = p.k2q_index + slab + shared.offsets[row];
        for (int word0 = 0; word0 < words; word0 += 32) {
            const int word = word0 + lane;
            uint32 bits = word < words ? sBits[word_at(row, word, words)] : 0;
            const int count = __popc(bits);
            const int through = warp_inclusive_sum(count);
            int32* next = list + through - count;
            for (; bits != 0; bits &= bits - 1) *next++ = 32 * word + __ffs(bits) - 1;
            list += __shfl_sync(kFullWarp, through, 31);
        }
    }
    // A list that names a block twice sets one bit for two entries: the gap before the next CTA's range gets ids that
    // are safe to follow.
    const int end = shared.offsets[kBlocksPerCta];
    if (end < below + inside) {
        errors |= kListNotAscending;
        for (int i = end + threadIdx.x; i < below + inside; i += kThreads) p.k2q_index[slab + i] = p.num_groups - 1;
    }
    raise_error(p.error_flag, errors);
}
