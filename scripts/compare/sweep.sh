# Sourced by the comparisons: a sweep is a list of units, each one pre-training with its fine-tunings. Every unit goes on
# where it was, finished ones are passed over; so a killed sweep is started again by the same command.
#
#   DATA_SET     folder of scripts/ with the data set's scripts (default shapes, the embedded data): ssv2, k400, ucf101, hmdb51,
#                custom (with NB_CLASSES)
#   DATA_PATH    folder with train.csv and val.csv (shapes: written where there is none)
#   METHODS      of tube random frame motion adamae tats, listwise and hide (TATS with --tats_objective listwise, and with
#                --tats_tau below 0), scratch (no pre-training)
#   MASK_RATIOS  SEEDS        lists, as "0.85 0.9 0.95"
#   EVALUATIONS  of finetune linear_probe attentive_probe (default finetune; empty: none)
#   MEASURE=1    also tools/measure.py on every pre-training
#   OUTPUT_DIR   default output/compare/NAME; METHOD-ratioR-seedS/{pretrain,finetune,linear_probe} are made in it
#   JOBS         units at a time on this machine (default 1), a log.txt each
#   SCALE, EPOCHS ...   all of scripts/common.sh; PRETRAIN_EPOCHS, FINETUNE_EPOCHS, PROBE_EPOCHS say it for one kind of run
#   PRETRAIN_EXTRA, FINETUNE_EXTRA   further flags, as "--no-flip --num_segments 8"
#   LIST=1       name the units instead, one a line
#
# Under Slurm as an array of as many jobs as there are units; each goes back into the queue as any other run does:
#   DATA_SET=ssv2 DATA_PATH=lists/ssv2 sbatch --array=0-26 scripts/slurm/pretrain.sbatch scripts/compare/table1.sh
# and the same command without sbatch writes the table once they are finished.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$REPOSITORY"
DATA_SET=${DATA_SET:-shapes} METHODS=${METHODS:-tube adamae tats} SEEDS=${SEEDS:-0} EVALUATIONS=${EVALUATIONS-finetune}
if [ "$DATA_SET" = shapes ]; then
    SCALE=${SCALE:-tiny} DATA_PATH=${DATA_PATH:-$REPOSITORY/output/shapes}
    export INPUT_SIZE=${INPUT_SIZE:-32}
fi
export SCALE=${SCALE:-paper}
if [ "$SCALE" = tiny ]; then export GPUS=${GPUS:-0}; fi
if [ -z "${DATA_PATH:-}" ]; then
    echo "error: set DATA_PATH to a folder with train.csv and val.csv" >&2
    exit 2
fi
if ! [ -f "scripts/$DATA_SET/finetune.sh" ]; then
    echo "error: DATA_SET=$DATA_SET: no scripts/$DATA_SET/finetune.sh" >&2
    exit 2
fi

# The paper's name of a data set.
declare -A PAPER_NAME=([ssv2]=SSv2 [k400]=K400 [ucf101]=UCF101 [hmdb51]=HMDB51)

UNITS=() # a line each: name, method, ratio, seed, flags
add_unit() { UNITS+=("$*"); }

# add_methods: every method at every ratio with every seed.
add_methods() {
    local ratio method seed
    for seed in $SEEDS; do # seeds outermost: a sweep that is stopped early has whole comparisons
        for ratio in $MASK_RATIOS; do
            for method in $METHODS; do
                add_unit "$method-ratio$ratio-seed$seed" "$method" "$ratio" "$seed"
            done
        done
    done
}

# add_variants NAME FLAGS...: TATS with other flags, at every ratio with every seed.
add_variants() {
    local name=$1 ratio seed
    shift
    for seed in $SEEDS; do
        for ratio in $MASK_RATIOS; do add_unit "$name-ratio$ratio-seed$seed" tats "$ratio" "$seed" "$@"; done
    done
}

interpreter() { if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; else (source scripts/common.sh && echo "$PYTHON"); fi; }

newest_checkpoint() { find "$1" -maxdepth 1 -name 'checkpoint-[0-9]*.pth' ! -name '*-step*' | sort -V | tail -n 1; }

# run_unit NAME METHOD RATIO SEED FLAGS...: in a subshell. DATA_PATH, DATA_SET: of pre-training; TO_SET, TO_PATH: of the
# fine-tuning where it is another, TO its name.
run_unit() {
    local folder=$OUTPUT/$1 method=$2 script
    export MASK_RATIO=$3 SEED=$4
    shift 4
    case $method in
        tube) script=pretrain_videomae.sh ;;
        random | adamae | tats) script=pretrain_$method.sh ;;
        listwise) script=pretrain_tats.sh && export TATS_OBJECTIVE=listwise ;;
        hide) script=pretrain_tats.sh && export TATS_OBJECTIVE=listwise TATS_TAU=-${TATS_TAU:-0.1} ;;
        scratch) script= ;;
        frame | motion) script=pretrain_random.sh && set -- --mask_type "$method" "$@" ;;
        *)
            echo "error: METHODS=$method: choose of tube random frame motion adamae tats listwise hide scratch" >&2
            return 2
            ;;
    esac
    local evaluation missing=""
    for evaluation in $EVALUATIONS; do
        [ -f "$folder/$evaluation${TO:+_$TO}/test.json" ] || missing+=" $evaluation"
    done
    if [ -z "$missing" ] && [ -n "${EVALUATIONS// /}" ] && { [ -z "${MEASURE:-}" ] || [ -z "$script" ] ||
        [ -f "$folder/pretrain/measures.json" ]; }; then return 0; fi
    local checkpoint=none
    if [ -n "$script" ]; then
        # shellcheck disable=SC2086  # the extra flags are several words
        EPOCHS=${PRETRAIN_EPOCHS:-${EPOCHS:-}} DATA_PATH=$DATA_PATH/train.csv OUTPUT_DIR=$folder/pretrain \
            bash "scripts/$DATA_SET/$script" "$@" ${PRETRAIN_EXTRA:-} || return
        checkpoint=$(newest_checkpoint "$folder/pretrain")
        if [ -n "${MEASURE:-}" ]; then
            "$(interpreter)" tools/measure.py "$folder/pretrain" --data_path "$DATA_PATH" || return
        fi
    fi
    for evaluation in $missing; do
        local probe="" epochs=${FINETUNE_EPOCHS:-${EPOCHS:-}} data=${TO_PATH:-$DATA_PATH}
        if [ "$evaluation" != finetune ]; then probe=--$evaluation epochs=${PROBE_EPOCHS:-${EPOCHS:-}}; fi
        # shellcheck disable=SC2086
        EPOCHS=$epochs MODEL_PATH=$checkpoint DATA_PATH=$data OUTPUT_DIR=$folder/$evaluation${TO:+_$TO} \
            bash "scripts/${TO_SET:-$DATA_SET}/finetune.sh" $probe ${FINETUNE_EXTRA:-} || return
    done
}

# The first of METHODS is what the others are compared with.
BASELINE=${METHODS%% *}

# run_units NAME FLAGS...: all units, or Slurm's one of them; then the table, with flags for tools/compare_runs.py.
run_units() {
    OUTPUT=${OUTPUT_DIR:-$REPOSITORY/output/compare/$1}
    shift
    if [ -n "${LIST:-}" ]; then
        printf '%s\n' "${UNITS[@]}"
        return
    fi
    if [ "$DATA_SET" = shapes ]; then (source scripts/shapes/data.sh && write_shapes "$DATA_PATH"); fi
    local unit words status failed=$OUTPUT/failed.txt
    rm -f "$failed"
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        if [ "$SLURM_ARRAY_TASK_ID" -ge "${#UNITS[@]}" ]; then
            echo "error: there are ${#UNITS[@]} units, none with number $SLURM_ARRAY_TASK_ID: use --array=0-$((${#UNITS[@]} - 1))" >&2
            exit 2
        fi
        read -ra words <<< "${UNITS[$SLURM_ARRAY_TASK_ID]}"
        run_unit "${words[@]}"
        return
    fi
    for unit in "${UNITS[@]}"; do
        while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; done
        read -ra words <<< "$unit"
        mkdir -p "$OUTPUT/${words[0]}"
        (
            status=0
            (run_unit "${words[@]}") >> "$OUTPUT/${words[0]}/log.txt" 2>&1 < /dev/null || status=$?
            if [ $status -eq 0 ]; then
                echo "$(date +%T) ${words[0]}: finished"
            else
                echo "$(date +%T) ${words[0]}: status $status, see $OUTPUT/${words[0]}/log.txt" | tee -a "$failed"
            fi
        ) &
    done
    wait
    "$(interpreter)" tools/compare_runs.py "$OUTPUT" --output "$OUTPUT" "$@"
    [ ! -f "$failed" ]
}
