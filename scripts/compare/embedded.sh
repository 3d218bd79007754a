#!/usr/bin/env bash
# make compare: five methods on the embedded data at one mask ratio, fine-tuned and probed; a table and pictures.
# Settings: scripts/compare/sweep.sh; with SEEDS="0 1 2" MASK_RATIOS="0.75 0.9" it is the comparison of docs/RESULTS.md.
export PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-7} FINETUNE_EPOCHS=${FINETUNE_EPOCHS:-25} PROBE_EPOCHS=${PROBE_EPOCHS:-30}
export JOBS=${JOBS:-$(nproc)} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # a thread a run costs least
METHODS=${METHODS:-tube random motion adamae tats} EVALUATIONS=${EVALUATIONS:-finetune linear_probe}
source "$(dirname "${BASH_SOURCE[0]}")/sweep.sh"
MASK_RATIOS=${MASK_RATIOS:-0.75}
add_methods
run_units embedded --baseline "$BASELINE" "$@"
