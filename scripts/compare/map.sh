#!/usr/bin/env bash
# Where do adaptive masks help? Size of the moving shape x mask ratio x mask, on the embedded data; map.png and table.md with
# the differences from random masks. bash scripts/compare/map.sh; 5 to 12 minutes per run, two at a time on two cores; shapes of
# the default size share the runs of make compare.
#   SIZES   ranges of the radius in sides, as "0.1-0.16 0.175-0.28"; the others: scripts/compare/sweep.sh
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$REPOSITORY/scripts/checks.sh"
[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || refuse "not as an array: it has several sweeps, each of them embedded.sh with a DATA_PATH"
make_absolute OUTPUT_DIR DATA_PATH
case ${PYTHON:-} in */*) make_absolute PYTHON ;; esac
OUTPUT=${OUTPUT_DIR:-$REPOSITORY/output/compare} SHAPES=${DATA_PATH:-$REPOSITORY/output/shapes}
SIZES=${SIZES:-0.1-0.16 0.175-0.28}
export METHODS=${METHODS:-random motion adamae listwise} SEEDS=${SEEDS:-0 1 2} MASK_RATIOS=${MASK_RATIOS:-0.75 0.85}
folders=()
for size in $SIZES; do
    [[ $size =~ ^[0-9.]+-[0-9.]+$ ]] || refuse "SIZES=$size: must be ranges as 0.1-0.16"
done
LIST=1 DATA_PATH=$SHAPES bash "$REPOSITORY/scripts/compare/embedded.sh" > /dev/null # refuses wrong settings
for size in $SIZES; do
    if [ "$size" = 0.175-0.28 ]; then # the default
        folder=$OUTPUT/embedded data=$SHAPES flags='' epochs=8
    else
        folder=$OUTPUT/size_$size data=${SHAPES}_$size flags="--shape_size ${size/-/ }" epochs=20 # small ones leave chance later
    fi
    folders+=("$folder")
    FINETUNE_EPOCHS=${FINETUNE_EPOCHS:-${EPOCHS:-$epochs}} SHAPES_FLAGS="$flags ${SHAPES_FLAGS:-}" DATA_PATH=$data OUTPUT_DIR=$folder \
        run_sweep bash "$REPOSITORY/scripts/compare/embedded.sh" || failed=1
done
[ -z "${LIST:-}${DRY_RUN:-}" ] || exit "${failed:-0}"
cd "$REPOSITORY"
interpreter=${PYTHON:-$(source scripts/common.sh && echo "$PYTHON")}
baseline=${METHODS%% *}
case $baseline in listwise | hide) baseline=tats ;; esac # alone
"$interpreter" tools/compare_runs.py "${folders[@]}" --output "$OUTPUT/map" --by mask_type mask_ratio tats_objective tats_tau \
    --baseline "$baseline" --level 50 "$@"
[ -z "${failed:-}" ]
