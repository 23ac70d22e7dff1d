#!/bin/sh
# Quality of sparse training within a budget of GPU time: for each seed full attention, DSV, variants of it and both windows, in
# this order, then paired evaluations and one report. Runs that were cut short go on where they stopped when this is called
# again; finished ones are not run again.
#
#   runtime/train/configs/quality.sh DIR SECONDS [--set KEY=VALUE ...]
#
# DIR gets a folder a run, evals.txt and report.html; SECONDS is the budget of this call. Further arguments go to every run.
#
# Stage 1 of a seed is run once, up to dsv.switch (base-SEED, with train.deterministic), and the others are forks: copies of
# that folder that go on, `full` in stage 1 to the end, `dsv` in stage 2, each of VARIANTS there with values of its own. So
# full attention and DSV are the same bits until the switch, and a pair differs by what sparsity does and not by chance: the
# same seed with other rounding from the first step on ends 1 to 5 % apart, a fork run again 0.1 %. Windows (`wa-m`, `wa-l`)
# begin at step 0 and are whole runs.
#
#   VARIANTS="b8:dsv.kv_block=8,train.deterministic=false need:dsv.share=need,dsv.max_keep=0.5"
#       further forks, as NAME:KEY=VALUE,...: any keys that dsv-train run --resume takes, values without commas or spaces
#   ONLY="full dsv b8"     these runs (default: full dsv, the names of VARIANTS, wa-m wa-l)
#   SEEDS="1 2"            these seeds
#   DSV_TRAIN=dsv-train    the program
#
# Calls with other ONLY or SEEDS may run at once (one makes the base of a seed, others wait for it), 1.5 times as fast together
# after `nvidia-cuda-mps-control -d`; one call of all makes the report.
set -eu
[ $# -ge 2 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
dir=$1 budget=$2
shift 2
train=${DSV_TRAIN:-dsv-train}
config=$(dirname "$0")/quality.toml
deadline=$(($(date +%s) + budget))

bad() { echo "error: $1" >&2; exit 2; }
later() { echo "$1: call again to go on"; exit 3; }

all="full dsv"
for variant in ${VARIANTS:-}; do
    name=${variant%%:*}
    case $variant in
    */*:* | :* | *:) bad "VARIANTS has $variant; the form is NAME:KEY=VALUE,... as in b8:dsv.kv_block=8" ;;
    *:*=*) ;;
    *) bad "VARIANTS has $variant; the form is NAME:KEY=VALUE,... as in b8:dsv.kv_block=8" ;;
    esac
    case " $all base wa-m wa-l " in *" $name "*) bad "VARIANTS names $name, which is taken; choose another name" ;; esac
    all="$all $name"
done
all="$all wa-m wa-l"
names=${ONLY:-$all}
for name in $names; do
    case " $all " in *" $name "*) ;; *) bad "ONLY names $name; allowed: $all" ;; esac
done

plan=$("$train" plan "$config" "$@")
# The value of a key as every run has it: value SECTION KEY
value() {
    printf '%s\n' "$plan" | awk -v section="[$1]" -v key="$2" '/^\[/ { here = $1 == section } here && $1 == key { print $3; exit }'
}
steps=$(value train steps) switch=$(value dsv switch)
case $switch in *[!0-9]*) switch=0 ;; esac
[ "$switch" -gt 0 ] && [ "$switch" -lt "$steps" ] \
    || bad "dsv.switch is no step at which runs can fork; allowed: 1 to $((steps - 1)), as in --set dsv.switch=$((steps / 3))"
mkdir -p "$dir"

# Seconds left for a run of this folder, enough to begin it.
left() {
    left=$((deadline - $(date +%s)))
    [ "$left" -gt 20 ] || later "budget used up before $1"
}

# Trains within the budget: go FOLDER ARGUMENTS
go() {
    to=$1
    shift
    left "$to"
    # SIGTERM writes a checkpoint; half a minute for that.
    timeout -k 30 "$left" "$train" run "$@" --out "$to" || later "$to ended early"
}

begun() { ls -d "$1"/checkpoints/step-* > /dev/null 2>&1; }

# A run from step 0, begun or cut short before: whole FOLDER ARGUMENTS
whole() {
    folder=$1
    shift
    if begun "$folder"; then set -- --resume "$@"; fi
    go "$folder" "$config" "$@"
}

# Makes FOLDER a copy of the seed's stage 1, which is run where it is not there yet: fork FOLDER SEED ARGUMENTS
fork() {
    copy=$1 seed=$2 base=$dir/base-$2
    shift 2
    [ ! -d "$copy" ] || return 0
    at=$base/checkpoints/step-$(printf %08d "$switch")
    left "$copy"
    exec 9> "$base.lock"
    flock -w "$left" 9 || later "budget used up before $copy"
    if [ ! -d "$at" ]; then
        whole "$base" --until "$switch" --set dsv.attention=dsv --set "train.seed=$seed" --set train.deterministic=true "$@"
        [ -d "$at" ] || later "$base was cut short"
    fi
    exec 9>&-
    # Under its name only when it is whole.
    rm -rf "$copy.part"
    mkdir -p "$copy.part/checkpoints"
    cp "$base/config.toml" "$base/metrics.jsonl" "$copy.part"
    cp -R "$at" "$copy.part/checkpoints"
    mv "$copy.part" "$copy"
}

# What sets a fork apart, as arguments of dsv-train run.
sets_of() {
    case $1 in
    full) echo "--set dsv.switch=$steps" ;;
    dsv) ;;
    *)
        for variant in $VARIANTS; do
            if [ "${variant%%:*}" = "$1" ]; then echo "--set ${variant#*:}" | sed 's/,/ --set /g'; fi
        done
        ;;
    esac
}

for seed in ${SEEDS:-1 2}; do
    for name in $names; do
        out=$dir/$name-$seed
        [ -e "$out/eval.json" ] && continue
        case $name in
        wa-m | wa-l) whole "$out" --set "dsv.attention=$name" --set "train.seed=$seed" "$@" ;;
        *)
            fork "$out" "$seed" "$@"
            # shellcheck disable=SC2046 # words
            go "$out" --resume "$@" $(sets_of "$name")
            ;;
        esac
        # A run that SIGTERM ended well has checkpoints but no sample.
        ls "$out"/sample.* > /dev/null 2>&1 || later "$out was cut short"
        "$train" eval --out "$out" --json "$out/eval.json"
    done
done

: > "$dir/evals.txt"
runs=
for seed in ${SEEDS:-1 2}; do
    for name in $names; do
        out=$dir/$name-$seed
        runs="$runs $out"
        if [ "$name" != full ] && [ -e "$dir/full-$seed/eval.json" ]; then
            echo "seed $seed, $name" >> "$dir/evals.txt"
            "$train" eval --out "$out" --against "$dir/full-$seed/eval.json" >> "$dir/evals.txt"
        fi
    done
done
# shellcheck disable=SC2086 # a list of folders
"$train" report $runs --out "$dir/report.html"
cat "$dir/evals.txt"
