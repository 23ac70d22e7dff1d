#pragma once
// What every attention kernel is told about its problem.
#include "dsv/types.cuh"

namespace dsv {

struct AttnSizes {
    int32 batch;            // B
    int32 num_heads;        // H
    int32 num_kv_heads;     // divides H
    int32 seqlen_q;         // Sq
    int32 seqlen_kv;        // Skv
    int32 seqlen_q_padded;  // Sq rounded up to 128
    int32 num_groups;       // G; 0 when dense
    int32 num_kv_blocks;    // N; 0 when dense
    int32 max_selected;     // width of the lists; 0 when dense
    float scale;            // of the logits
    float scale_log2;       // scale * log2(e)
    int32 reserved;
};

}  // namespace dsv
