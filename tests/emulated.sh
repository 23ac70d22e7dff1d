#!/usr/bin/env bash
# The GPU tests on a machine without a GPU: builds the emulated driver (tests/emulator) and the test program, and runs
# one under the other. Arguments go to the test program (a filter, --exact, --skip, --list). Without any it runs what
# tests/run.sh asks for: every shipped kernel on a few short cases.
#
# DSV_EMULATOR_SEED=N gives another order of everything that has none. What the emulator finds it says on stderr.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Of the whole workspace, as tests/run.sh builds, so that no dependency is built a second time with other features.
cargo build --release --quiet --workspace --lib
program=$(cargo test --release --quiet --workspace --exclude dsv-train --features dsv-tests/gpu --test gpu --no-run --message-format=json |
    sed -n 's/.*"name":"gpu".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
# Wherever cargo builds (CARGO_TARGET_DIR, build.target-dir).
target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
emulated=$target/emulated
mkdir -p "$emulated"
# Renamed into place: a program that runs keeps the library it has.
cp "$target/release/libdsv_emulator.so" "$emulated/.new" && mv "$emulated/.new" "$emulated/libcuda.so.1"
ln -sf libcuda.so.1 "$emulated/libcuda.so"
# Kernels take seconds here, not milliseconds.
export DSV_GPU_TEST_LIMIT=${DSV_GPU_TEST_LIMIT:-600} LD_LIBRARY_PATH=$emulated

if (($#)); then
    exec "$program" "$@"
fi

# Shipped kernels, not the tuner's candidates; these cases, not those of thousands of tokens.
cases='^(attn_(fwd|bwd|bwd_dq)/(fine_)?(no_multiple|last_block_of_one_token|last_unit_of_one_token|counts_zero_and_one_adjacent|counts_differ)-'
cases+='|attn_(fwd|bwd|bwd_dq)/dims_(no_multiple|counts_differ)-'
cases+='|faults/|adamw_8bit/blocks_(1|7)$|predictor/|profile/|flow_prepare/|kv_lists/(no_multiple|last_block|empty_groups|odd_count|counts|Index|Count|Repeated|Descending)'
cases+='|kv_select/(typical|equal_scores|nan_key|one_token|nothing_and_everything|signs_of_zero|kept_by_a_mask_alone)/'
cases+='|kv_select_fine/(typical|equal_scores|nan_key|kept_nan|kept_by_a_mask_alone|text_and_own_cube|one_token|few_values)/)'
all=$emulated/all chosen=$emulated/chosen
# A kernel that is shipped and a candidate is listed twice.
"$program" --list 2>/dev/null | sed -n 's/: test$//p' | awk '!seen[$0]++' >"$all"
find generated/kernels -name '*.cu' -printf '%f\n' | sed 's/\.cu$//' | sort >"$emulated/shipped"
# Masses too small or too large for f32 by themselves; no kernel of this rule is shipped.
extremes='^kv_select_fine/(drift|one_giant)/.*_mass4_'
# A head_dim and ranks that no shipped kernel has.
dims='^attn_(fwd|bwd|bwd_dq)/dims_no_multiple-d80-(dense|random).*_(m128n128_g1c2s2|m64n128_g1c2s2|m64n64_g1c1s2|m128n64_g1c2s3)x1_grid_'
ranks='^kv_select(_fine)?/(typical|nan_key)/.*_r(32|48|64)_'
# Two groups in a CTA at head_dims for which that does not ship, and persistent CTAs for dQ, which do not.
pairs='^attn_(fwd|bwd_dq)/((dims_)?no_multiple|counts_differ|last_block_of_one_token|clustered)-d(64|96)-.*_g2c2s[0-9]x1_persistent_'
pairs+='|^attn_bwd_dq/(no_multiple|counts_differ|clustered)-d128-.*_persistent_'
awk -v cases="$cases" -v others="$extremes|$dims|$ranks|$pairs" -F/ '
    NR == FNR { shipped[$0]; next }
    $0 ~ others || $0 ~ cases && ($NF in shipped || $1 == "faults" || $1 == "kv_lists" || $1 == "predictor" || $1 == "profile" || $1 == "flow_prepare" || $1 == "adamw_8bit")
' "$emulated/shipped" "$all" >"$chosen"
printf 'emulated: %d of the %d GPU tests; left out: the tuner'"'"'s candidates, and cases not named in %s\n' \
    "$(wc -l <"$chosen")" "$(wc -l <"$all")" "${BASH_SOURCE[0]}"
DSV_GPU_TEST_ONLY=$chosen "$program"

# The C interface, as a C program has it.
cc -std=c99 -Wall -Wextra -Werror runtime/capi/examples/attention.c -Iruntime/capi/include -L"$target/release" -ldsv \
    -L"$emulated" -l:libcuda.so.1 -lm -o "$emulated/attention"
LD_LIBRARY_PATH=$target/release:$LD_LIBRARY_PATH "$emulated/attention"
