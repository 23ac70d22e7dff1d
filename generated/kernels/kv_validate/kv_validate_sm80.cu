// kv_validate_sm80
// Generated from templates/kernels/kv_validate.cu.tera by dsv-codegen: do not edit, change the template or the spec.
// kv_validate, sm80

// Checks KV lists against the contract: 0 <= count <= max_selected; ids in [0, N), ascending and unique.
// One warp a group. Floor: the lists are read once. Raises bits of the error flag and changes nothing else.
#include "dsv/types.cuh"
#include "dsv/warp.cuh"

using namespace dsv;

// BEGIN CONFIG
constexpr int kThreads = 256;
constexpr int kCtasPerSm = 1;
constexpr int kParamsBytes = 48;
// END CONFIG

static_assert(kThreads == 8 * 32, "the grid gives a CTA eight groups");

struct Params {
    const int32* q2k_index;  // [B, H, G, max_selected]
    const int32* q2k_count;  // [B, H, G]
    int32* error_flag;       // [1]
    int32 batch;
    int32 num_heads;
    int32 num_groups;
    int32 num_kv_blocks;
    int32 max_selected;
    int32 reserved;
};
static_assert(sizeof(Params) == kParamsBytes, "Params differs from dsv_spec::params::KvValidate");

extern "C" __global__ void __launch_bounds__(kThreads, kCtasPerSm) kv_validate_sm80(const __grid_constant__ Params p) {
    const int group = blockIdx.x * 8 + warp_index();
    if (group >= p.num_groups) return;
    const int64 row = (static_cast<int64>(blockIdx.z) * p.num_heads + blockIdx.y) * p.num_groups + group;
    const int32* list = p.q2k_index + row * p.max_selected;
    int32 errors = 0;
    int count = p.q2k_count[row];
    if (count < 0 || count > p.max_selected) {
        errors |= kCountOutOfRange;
        count = min(max(count, 0), p.max_selected);
    }
    for (int i = lane_index(); i < count; i += 32) {
        const int block = list[i];
        if (block < 0 || block >= p.num_kv_blocks) errors |= kIndexOutOfRange;
        if (i > 0 && list[i - 1] >= block) errors |= kListNotAscending;
    }
    raise_error(p.error_flag, errors);
}
