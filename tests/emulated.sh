#!/usr/bin/env bash
# The GPU tests on a machine without a GPU: builds the emulated driver (tests/emulator) and the test program, and runs
# it with these arguments (filters, --exact, --skip, --list). DSV_EMULATOR_SEED=N gives another order of everything that
# has none; what the emulator finds wrong it says on stderr.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo build --release --quiet -p dsv-emulator
program=$(cargo test --release --quiet -p dsv-tests --features gpu --test gpu --no-run --message-format=json |
    sed -n 's/.*"name":"gpu".*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
mkdir -p target/emulated
cp target/release/libdsv_emulator.so target/emulated/libcuda.so.1
ln -sf libcuda.so.1 target/emulated/libcuda.so
# Kernels run in seconds here, not in milliseconds.
DSV_GPU_TEST_LIMIT=${DSV_GPU_TEST_LIMIT:-600} LD_LIBRARY_PATH=$PWD/target/emulated "$program" "$@"
