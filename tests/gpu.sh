#!/usr/bin/env bash
# The GPU tests, made here and run on a GPU machine.
#   tests/gpu.sh pack DIR    here: builds the test programs and tools, and puts them, stripped, with this script into DIR
#   DIR/gpu.sh run           there: every test, then compute-sanitizer over a part of them; logs under DIR/log
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
    cargo build --profile dist -p dsv-train -p dsv-autotune || exit 1
    target=$(cargo metadata --format-version 1 --no-deps | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    mkdir -p "$to" || exit 1
    cp "$kernels" "$to/gpu-kernels" && cp "$trainer" "$to/gpu-trainer" || exit 1
    cp "$target/dist/dsv-train" "$target/dist/dsv-autotune" "$here/gpu.sh" "$to" || exit 1
    cp runtime/train/configs/*.toml "$to" || exit 1
    strip "$to/gpu-kernels" "$to/gpu-trainer"
    echo "packed into $to; on the GPU machine: $to/gpu.sh run"
}

failed=0
summary=()

# step NAME LIMIT COMMAND...: at most LIMIT seconds, output in log/NAME.
step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    timeout "$limit" "$@" >"log/$name" 2>&1
    status=$?
    ((status == 0)) || failed=$((failed + 1))
    summary+=("$(printf '%-18s exit %3d  %4d s  %s' "$name" $status $((SECONDS - start)) \
        "$(grep -E '^test result|ERROR SUMMARY|RACECHECK SUMMARY' "log/$name" | tail -2 | tr '\n' ' ')")")
}

run() {
    cd "$here" || exit 1
    mkdir -p log
    step kernels 480 ./gpu-kernels
    step trainer 120 ./gpu-trainer --test-threads 1
    export DSV_GPU_TEST_IN_PROCESS=1 DSV_GPU_TEST_LIMIT=120
    step memcheck 200 compute-sanitizer --tool memcheck --error-exitcode 9 ./gpu-kernels no_multiple
    step memcheck-faults 60 compute-sanitizer --tool memcheck --error-exitcode 9 ./gpu-kernels faults
    step memcheck-lists 60 compute-sanitizer --tool memcheck --error-exitcode 9 ./gpu-kernels kv_
    step racecheck 200 compute-sanitizer --tool racecheck --error-exitcode 9 ./gpu-kernels no_multiple
    step racecheck-lists 60 compute-sanitizer --tool racecheck --error-exitcode 9 ./gpu-kernels kv_
    for name in kernels trainer; do grep -E 'FAILED|panicked|times the tolerance|outside tolerance' "log/$name" | head -20; done
    printf '%s\n' "${summary[@]}"
    exit $failed
}

case "${1:-}" in
    pack) [[ $# -eq 2 ]] || { echo "usage: tests/gpu.sh pack DIR" >&2; exit 2; }; pack "$2" ;;
    run) run ;;
    *) echo "usage: tests/gpu.sh pack DIR | DIR/gpu.sh run" >&2; exit 2 ;;
esac
