#!/usr/bin/env bash
# The paper's tables 3, 5 and 6 on the embedded data: scripts/ablations/ with measures of the checkpoint (tools/measure.py) in
# place of fine-tuning. bash scripts/compare/ablations.sh; 28 runs per seed of 1,500 steps, TATS from step 750: 47 minutes per
# seed on two cores.
# Settings: scripts/compare/sweep.sh.
#   BLOCKS   of attention tats_blocks decoder_depth loss rollout coefficients
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../checks.sh"
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || refuse "not as an array: it has several sweeps, each of them one of scripts/ablations/"
BLOCKS=${BLOCKS:-attention tats_blocks decoder_depth loss rollout coefficients}
need_words BLOCKS "attention tats_blocks decoder_depth loss rollout coefficients"
export DATA_SET=shapes SEEDS=${SEEDS:-0 1 2} EVALUATIONS=${EVALUATIONS-} MEASURE=${MEASURE-1}
export PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-4} BATCH_SIZE=${BATCH_SIZE:-8} NUM_SAMPLE=${NUM_SAMPLE:-2} # 375 steps of 16 clips
# As the paper: no bound, and coefficients of 1e-4; with less entropy nearly every row collapses (docs/LOG.md).
export TATS_START_EPOCH=${TATS_START_EPOCH:-2} TATS_LOGIT_CAP=${TATS_LOGIT_CAP:-0} ENTROPY_COEF=${ENTROPY_COEF:-1e-4}
export CPU_JOBS=$(nproc) OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
declare -A BASELINE=([attention]=trajectory [tats_blocks]=1 [decoder_depth]=2 [loss]=mse,True [rollout]=2,1
    [coefficients]=1e-4,1e-4,1e-4) # the row that is alike in all of them
if [[ " ${EK:-2,1} " != *" 2,1 "* ]]; then BASELINE[rollout]=${EK%% *}; fi
for block in $BLOCKS; do # refuses wrong settings
    LIST=1 bash "$(dirname "${BASH_SOURCE[0]}")/../ablations/$block.sh" > /dev/null
done
for block in $BLOCKS; do
    OUTPUT_DIR=${OUTPUT_DIR:+$OUTPUT_DIR/$block} run_sweep bash "$(dirname "${BASH_SOURCE[0]}")/../ablations/$block.sh" \
        --baseline "${BASELINE[$block]}" "$@" || failed=1
done
[ -z "${failed:-}" ]
