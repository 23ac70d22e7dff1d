#!/usr/bin/env bash
# All tests that need no GPU, and without arguments also GPU tests under the emulated driver. Fetches NVRTC into the
# checkout (.cuda) when it is not there; needs Rust, Python and pip. Arguments go to cargo test.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo run --release --quiet --bin dsv-codegen -- fetch-nvrtc
cargo test --release --workspace --no-fail-fast "$@"
if ((!$#)); then
    ./tests/emulated.sh
fi
