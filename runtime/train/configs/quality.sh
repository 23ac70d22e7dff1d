#!/bin/sh
# Quality of sparse training within a budget of GPU time: for each seed full attention, DSV and both windows, in this order,
# then paired evaluations and one report. Runs that were cut short go on where they stopped when this is called again;
# finished ones are not run again.
#
#   runtime/train/configs/quality.sh DIR SECONDS [--set KEY=VALUE ...]
#
# DIR gets a folder a run, evals.txt and report.html; SECONDS is the budget of this call. Further arguments go to every
# run. DSV_TRAIN names the program (default: dsv-train), ONLY the runs ("dsv full"), SEEDS the seeds ("1 2"). Calls with other
# ONLY or SEEDS may run at once, 1.5 times as fast together after `nvidia-cuda-mps-control -d`; one call of all makes the report.
set -eu
[ $# -ge 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
dir=$1 budget=$2
shift 2
train=${DSV_TRAIN:-dsv-train}
config=$(dirname "$0")/quality.toml
deadline=$(($(date +%s) + budget))
mkdir -p "$dir"

for seed in ${SEEDS:-1 2}; do
    for attention in ${ONLY:-full dsv wa-m wa-l}; do
        out=$dir/$attention-$seed
        [ -e "$out/eval.json" ] && continue
        left=$((deadline - $(date +%s)))
        [ "$left" -gt 20 ] || { echo "budget used up before $out: call again to go on"; exit 3; }
        resume=
        [ -d "$out/checkpoints" ] && resume=--resume
        # SIGTERM writes a checkpoint; half a minute for that.
        timeout -k 30 "$left" "$train" run "$config" $resume --out "$out" --set "dsv.attention=$attention" \
            --set "train.seed=$seed" "$@" || { echo "$out ended early: call again to go on"; exit 3; }
        # A run that SIGTERM ended well has checkpoints but no sample.
        ls "$out"/sample.* > /dev/null 2>&1 || { echo "$out was cut short: call again to go on"; exit 3; }
        "$train" eval --out "$out" --json "$out/eval.json"
    done
done

: > "$dir/evals.txt"
runs=
for seed in ${SEEDS:-1 2}; do
    for attention in ${ONLY:-full dsv wa-m wa-l}; do
        out=$dir/$attention-$seed
        runs="$runs $out"
        if [ "$attention" != full ] && [ -e "$dir/full-$seed/eval.json" ]; then
            echo "seed $seed, $attention" >> "$dir/evals.txt"
            "$train" eval --out "$out" --against "$dir/full-$seed/eval.json" >> "$dir/evals.txt"
        fi
    done
done
# shellcheck disable=SC2086 # a list of folders
"$train" report $runs --out "$dir/report.html"
cat "$dir/evals.txt"
