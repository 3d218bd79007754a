#!/usr/bin/env bash
# make compare: masks on the embedded data at one mask ratio: pre-training on ten kinds of motion, measured (tools/measure.py)
# and fine-tuned on four of them (right, left, up or down?), beside training from scratch; a table and pictures.
# Settings: scripts/compare/sweep.sh. More seeds are added by the same command, as SEEDS="0 1 2 3 4".
# Of 6 epochs of fine-tuning some runs have just left chance; of 12, runs from scratch leave it too: docs/LOG.md.
export PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-4} FINETUNE_EPOCHS=${FINETUNE_EPOCHS:-8} PROBE_EPOCHS=${PROBE_EPOCHS:-30}
export CPU_JOBS=$(nproc) OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one thread per run costs least
METHODS=${METHODS:-random tube listwise scratch} SEEDS=${SEEDS:-0 1 2} MEASURE=${MEASURE-1}
source "$(dirname "${BASH_SOURCE[0]}")/sweep.sh"
TO_PATH=${TO_PATH:-$DATA_PATH/translations} FINETUNE_EXTRA="--nb_classes 4 ${FINETUNE_EXTRA:-}"
MASK_RATIOS=${MASK_RATIOS:-0.85}
add_methods
run_units embedded "${BY[@]}" --baseline "$BASELINE" --level 50 "$@"
