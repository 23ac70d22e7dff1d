#!/usr/bin/env bash
# The GPU tests, made here and run on a GPU machine.
#   tests/gpu.sh pack DIR    here: builds the test programs and tools, and puts them, stripped, with this script into DIR
#   DIR/gpu.sh run           there: every test of the shipped kernels, the trainer and the PyTorch binding
#   DIR/gpu.sh sanitize      there: compute-sanitizer over a part of them
#   DIR/gpu.sh candidates    there: the same cases for kernels that are not shipped: the tuner's candidates, other shapes
# Each is made to end within ten minutes; logs under DIR/log.
# Ends with one line a step; the exit status is the number of steps that failed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The program that cargo names for the test `gpu` of a package.
test_program() {
    cargo test --release -p "$1" --features gpu --test gpu --no-run 2>&1 | tee /dev/stderr |
        sed -n 's/.*Executable tests\/gpu.rs (\(.*\))/\1/p'
}

pack() {
    local to=$1 kernels trainer target
    cd "$here/.." || exit 1
    kernels=$(test_program dsv-tests) && trainer=$(test_program dsv-train) || exit 1
    cargo build --profile dist -p dsv-train -p dsv-autotune -p dsv-capi || exit 1
    target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    mkdir -p "$to" || exit 1
    cp "$kernels" "$to/gpu-kernels" && cp "$trainer" "$to/gpu-trainer" || exit 1
    cp "$target/dist/dsv-train" "$target/dist/dsv-autotune" "$here/gpu.sh" "$to" || exit 1
    cp runtime/train/configs/*.toml "$to" || exit 1
    mkdir -p "$to/capi" && cp -r runtime/capi/include runtime/capi/python "$target/dist/libdsv.so" "$to/capi" || exit 1
    strip "$to/gpu-kernels" "$to/gpu-trainer"
    # Attention tests end in the kernel's name; a kernel that is shipped and a candidate is listed twice.
    find generated/kernels -name '*.cu' -printf '%f\n' | sed 's/\.cu$//' >"$to/shipped"
    "$to/gpu-kernels" --list 2>/dev/null | sed -n 's/: test$//p' | awk '!seen[$0]++' |
        awk -F/ -v to="$to" 'NR == FNR { shipped[$0]; next }
            { print >(to "/" (!/^attn_/ || $NF in shipped ? "run" : "candidates") ".list") }' "$to/shipped" - || exit 1
    grep -E '/(fine_)?no_multiple-|/dims_no_multiple-d[0-9]+-(dense|random-qg64kb64)/|^(faults|kv_lists|kv_select|predictor|profile|flow_prepare|kv_select_fine/(typical|kept_nan))/|^adamw_8bit/blocks_(1|7)$' "$to/run.list" >"$to/sanitize.list" || exit 1
    echo "packed into $to; on the GPU machine: $to/gpu.sh run"
}

failed=0
summary=()

# step NAME LIMIT COMMAND...: at most LIMIT seconds, output in log/NAME.
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout "$limit" bash -c '"$@"' step "$@" >"log/$name" 2>&1
    status=$?
    ((status == 0)) || failed=$((failed + 1))
    summary+=("$(printf '%-12s exit %3d  %4d s  %s' "$name" $status $((SECONDS - start)) \
        "$(awk '/^test result/ { passed += $4; bad += $6 } /ERROR SUMMARY|RACECHECK SUMMARY/ { runs++; found += $4 }
            END { printf "%d passed, %d failed", passed, bad; if (runs) printf "; the sanitizer found %d in %d processes", found, runs }' "log/$name")")")
}

# together WORKERS LIST COMMAND...: the command over a list of tests, cut into parts that share their kernels, that many
# at a time: one process leaves the GPU idle most of the time. The parts' outputs, one after the other.
together() {
    local workers=$1 list=$2 parts status
    shift 2
    parts=$(mktemp -d)
    awk -F/ '{ print $NF "\t" $0 }' "$list" | sort | cut -f 2 >"$parts.all"
    split -n l/$((workers * 3)) "$parts.all" "$parts/"
    find "$parts" -type f -size +0 -print0 |
        xargs -0 -P "$workers" -I {} bash -c 'DSV_GPU_TEST_ONLY=$1 "${@:2}" >"$1.log" 2>&1' together {} "$@"
    status=$?
    cat "$parts"/*.log
    rm -r "$parts" "$parts.all"
    return $status
}

export -f together

# Prints what failed in the named logs, then the summary.
finish() {
    for name in "$@"; do [[ ! -e log/$name ]] || grep -E 'FAILED|panicked|times the tolerance|outside tolerance' "log/$name" | head -20; done
    printf '%s\n' "${summary[@]}"
    exit $failed
}

run() {
    step kernels 420 together 8 run.list ./gpu-kernels
    step trainer 120 ./gpu-trainer --test-threads 1
    # Where there is PyTorch.
    if python3 -c 'import torch' 2>/dev/null; then
        step binding 120 env DSV_LIBRARY=capi/libdsv.so python3 capi/python/test_dsv_torch.py
    fi
    finish kernels trainer binding
}

sanitize() {
    export DSV_GPU_TEST_IN_PROCESS=1 DSV_GPU_TEST_LIMIT=120
    grep -v '^faults' sanitize.list >race.list
    step memcheck 270 together 8 sanitize.list compute-sanitizer --tool memcheck --error-exitcode 9 ./gpu-kernels
    step racecheck 270 together 8 race.list compute-sanitizer --tool racecheck --error-exitcode 9 ./gpu-kernels
    finish memcheck racecheck
}

candidates() {
    step candidates 570 together 8 candidates.list ./gpu-kernels
    finish candidates
}

case "${1:-}" in
    pack) [[ $# -eq 2 ]] || { echo "usage: tests/gpu.sh pack DIR" >&2; exit 2; }; pack "$2" ;;
    run | sanitize | candidates)
        cd "$here" && mkdir -p log || exit 1
        "$1"
        ;;
    *) echo "usage: tests/gpu.sh pack DIR | DIR/gpu.sh run | sanitize | candidates" >&2; exit 2 ;;
esac
