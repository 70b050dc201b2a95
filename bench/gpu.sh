#!/usr/bin/env bash
# The first ten minutes on a card: what it says of itself, the kernels that it chooses, the tests that need it, memory
# over replies, steps of --compile, then prompts and steps beside transformers; a table against the targets last.
#
#     bench/gpu.sh [1b|3b]        PY: which python; OUT: where logs go, /tmp/gpu by default
#
# DRY=1 runs every line on a CPU at toy sizes, the plain step in place of that of --compile, to try this script itself.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
dims=${1:-1b} PY=${PY:-python} DRY=${DRY:-} failed=0
export DRY OUT=${OUT:-/tmp/gpu} DIMS=${DRY:+tiny}
export DIMS=${DIMS:-$dims} PYTHONPATH=.
mkdir -p "$OUT"
rm -f "$OUT/rows.jsonl" "$OUT/all.log"

go() { # seconds, command: its last lines, and whether it ended well
    local seconds=$1 status
    shift
    printf '\n=== %s\n' "$*"
    timeout "$seconds" "$@" >"$OUT/log" 2>&1
    status=$?
    tail -n 30 "$OUT/log" | cut -c1-180
    cat "$OUT/log" >>"$OUT/all.log"
    [ $status = 0 ] || { echo "!!! exit $status"; failed=1; }
}

probe() { go "$1" "$PY" bench/gpu.py "${@:2}"; }

probe 60 env
probe 90 kernels
echo "-> _math anywhere: a prompt's further pieces or padding fill the memory with scores"
go 240 "$PY" -m pytest -q -p no:cacheprovider --tb=line tests/test_fast_cuda.py ${DRY:+--collect-only}
echo "-> a failure here is news: everything that follows rests on these"
probe 90 plain
echo "-> largest over 5 x the median: something plans anew for each length, as cuDNN does"
probe 90 memory
echo "-> growth: a stream or a graph outlives its reply"
probe 120 step 1
echo "-> many launches a layer: read the largest; late far slower than early: attention"
probe 120 step 64
echo "-> grouped products under half of the bandwidth: a kernel of our own pays"
probe 580 speed
probe 30 table
echo "all output: $OUT/all.log"
exit $failed
