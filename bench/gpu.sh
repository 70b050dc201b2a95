#!/usr/bin/env bash
# What a card does with this model, in one process of at most four minutes.
#
#     bench/gpu.sh [--dims 1b,3b] [--no-transformers] [first] [right] [step] [prompts] [profile]
#     bench/gpu.sh tests      the tests that need a card: in parallel, by pytest-xdist if it is there
#
# PY: which python. OUT: where everything is kept as it comes, /tmp/gpu by default.
# DRY=1 runs every line on a CPU at toy sizes, to try this script itself.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export OUT=${OUT:-/tmp/gpu} PY=${PY:-python} PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"

card_tests() {
    local files how=(-m card -q -p no:cacheprovider --tb=short --durations=5)
    mapfile -t files < <(grep -lE 'CARD|mark\.card' test_granitemoe.py tests/test_*.py)
    if "$PY" -c "import xdist" 2>/dev/null; then
        "$PY" -m pytest "${how[@]}" -n 8 --dist worksteal "${files[@]}"
    else # a process for each file
        printf '%s\n' "${files[@]}" | xargs -P 8 -I FILE "$PY" -m pytest "${how[@]}" FILE
    fi
}

if [ "${1:-}" = tests ]; then
    card_tests 2>&1 | tee -a "$OUT/gpu.log"
else
    timeout 270 "$PY" -u bench/gpu.py "$@" 2>&1 | tee -a "$OUT/gpu.log"
fi
