# Sourced by the comparisons: a sweep is a list of units, each one pre-training with its fine-tunings. Started
# again by the same command, a sweep resumes its units and skips finished ones.
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
#   JOBS         units at a time on this machine (default 1; of units of minutes: one per core), a log.txt each. Each unit has
#                GPUS of the GPUs for itself; they share them only where GPUS=1
#   SCALE, EPOCHS ...   all of scripts/common.sh; PRETRAIN_EPOCHS, FINETUNE_EPOCHS, PROBE_EPOCHS say it for one kind of run
#   PRETRAIN_EXTRA, FINETUNE_EXTRA   further flags, as "--no-flip --num_segments 8"
#   LIST=1       name the units instead, one per line (DRY_RUN=1 too)
# Paths are relative to where the command is given. A unit whose flags are not those it was started with is refused: another
# protocol is another OUTPUT_DIR.
#
# Under Slurm as an array of as many jobs as there are units; each goes back into the queue as any other run does:
#   DATA_SET=ssv2 DATA_PATH=lists/ssv2 sbatch --array=0-8 scripts/slurm/pretrain.sbatch scripts/compare/table1.sh
# and the same command without sbatch writes the table once they are finished.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
source "$REPOSITORY/scripts/checks.sh"
DATA_SET=${DATA_SET:-shapes} METHODS=${METHODS:-tube adamae tats} SEEDS=${SEEDS:-0} EVALUATIONS=${EVALUATIONS-finetune}
if [ "$DATA_SET" = shapes ]; then
    SCALE=${SCALE:-tiny} DATA_PATH=${DATA_PATH:-$REPOSITORY/output/shapes}
    export INPUT_SIZE=${INPUT_SIZE:-32}
fi
export SCALE=${SCALE:-paper}
if [ "$SCALE" = tiny ]; then export GPUS=${GPUS:-0}; fi

make_absolute DATA_PATH TO_PATH OUTPUT_DIR MODEL_PATH
case ${PYTHON:-} in */*) make_absolute PYTHON ;; esac
cd "$REPOSITORY"
[ -n "${DATA_PATH:-}" ] || refuse "set DATA_PATH to a folder with train.csv and val.csv"
for name in DATA_SET TO_SET; do
    for script in pretrain_random finetune; do
        [ -z "${!name:-}" ] || [ -f "scripts/${!name}/$script.sh" ] || refuse "$name=${!name}: no scripts/${!name}/$script.sh"
    done
    [ "${!name:-}" != custom ] || [ -n "${NB_CLASSES:-}" ] || refuse "set NB_CLASSES to the number of classes in the lists"
done
for name in JOBS PRETRAIN_EPOCHS FINETUNE_EPOCHS PROBE_EPOCHS; do need_whole "$name" 1; done
need_whole GPUS 0
need_words METHODS "tube random frame motion adamae tats listwise hide scratch"
[ -z "${EVALUATIONS// /}" ] || need_words EVALUATIONS "finetune linear_probe attentive_probe"
case ${TATS_TAU:-} in -*) refuse "TATS_TAU=$TATS_TAU: must be above 0, METHODS=hide has it below" ;; esac

METHODS=$(echo $METHODS) # one space between them
# The first of METHODS is what the others are compared with; listwise and hide are told apart by more than the mask.
BASELINE=${METHODS%% *} BY=()
case " $METHODS " in
    *" listwise "* | *" hide "*)
        BY=(--by mask_type mask_ratio tats_objective tats_tau)
        case $BASELINE in
            tats | listwise | hide)
                [[ $METHODS != *" "* ]] || refuse "METHODS=$METHODS: the first one is what listwise and hide are compared" \
                    "with: put one of tube random frame motion adamae scratch there"
                BASELINE=tats
                ;;
        esac
        ;;
esac

# The paper's name of a data set.
declare -A PAPER_NAME=([ssv2]=SSv2 [k400]=K400 [ucf101]=UCF101 [hmdb51]=HMDB51)

UNITS=() # a line each: name, method, ratio, seed, flags; quoted as the shell reads them
add_unit() {
    local line
    printf -v line '%q ' "$@"
    UNITS+=("${line% }")
}

# add_methods: every method at every ratio with every seed; scratch, which knows no ratio, at the first one.
add_methods() {
    local ratio method seed first
    for seed in $SEEDS; do # seeds outermost: a sweep that is stopped early has whole comparisons
        first=1
        for ratio in $MASK_RATIOS; do
            for method in $METHODS; do
                if [ "$method" != scratch ] || [ -n "$first" ]; then
                    add_unit "$method-ratio$ratio-seed$seed" "$method" "$ratio" "$seed"
                fi
            done
            first=
        done
    done
}

# add_variants NAME FLAGS...: TATS with other flags, at every ratio with every seed. Of the embedded data's 64 tokens the
# paper's ratio would leave 3.
add_variants() {
    local name=$1 ratio=0.95 seed
    shift
    if [ "$DATA_SET" = shapes ]; then ratio=0.75; fi
    MASK_RATIOS=${MASK_RATIOS:-$ratio}
    for seed in $SEEDS; do
        for ratio in $MASK_RATIOS; do add_unit "$name-ratio$ratio-seed$seed" tats "$ratio" "$seed" "$@"; done
    done
}

interpreter() { if [ -n "${PYTHON:-}" ]; then echo "$PYTHON"; else (source scripts/common.sh && echo "$PYTHON"); fi; }

# What changes no result: where a unit's files are, and how it is run and saved.
FREE='data_path|output_dir|log_dir|finetune|num_workers|pin_mem|device|print_freq|picture_freq|save_ckpt|save_ckpt_freq'
FREE+='|save_ckpt_minutes|keep_last|use_checkpoint|checkpoint_modules'

# flags_of SCRIPT FLAGS...: what it gives its program, a line per flag, without those of FREE.
flags_of() {
    MODEL_PATH=none DRY_RUN=1 bash "$@" | awk '
        begun && /^--/ && line { print line; line = "" }
        begun { line = line (line ? " " : "") $0 }
        /run_[a-z_]*\.py$/ { begun = 1 }
        END { print line }' | sed -E "/^--(no-)?($FREE)( |\$)/d"
}

# sorted_flags: of such lines those that count, the last of each flag.
sorted_flags() { awk '{ name = $1; sub(/^--no-/, "--", name); last[name] = $0 } END { for (name in last) print last[name] }' | sort; }

# step FOLDER DONE SCRIPT FLAGS...: one program of a unit; DONE (not empty): only the check of its flags, which are kept beside
# what it writes.
step() {
    local folder=$1 finished=$2 flags changed
    shift 2
    [ -z "${stopped:-}" ] || return 75
    flags=$(OUTPUT_DIR=$folder flags_of "$@") || return
    if [ -n "$finished" ] || compgen -G "$folder/checkpoint-*" > /dev/null; then
        changed=
        if [ -f "$folder/flags.txt" ]; then # sweeps of earlier revisions have none
            changed=$(diff <(sorted_flags < "$folder/flags.txt") <(sorted_flags <<< "$flags") |
                sed -n 's/^< /was /p; s/^> /now /p' | paste -sd ',' | sed 's/,/, /g')
        fi
        if [ -n "$changed" ]; then
            echo "error: $folder was started with other flags ($changed): use another OUTPUT_DIR, or delete its flags.txt" >&2
            return 2
        fi
    else # in one move: several tasks of a job do it
        mkdir -p "$folder"
        echo "$flags" > "$folder/flags.txt.$HOSTNAME.$BASHPID" && mv "$folder/flags.txt.$HOSTNAME.$BASHPID" "$folder/flags.txt"
    fi
    [ -n "$finished" ] || OUTPUT_DIR=$folder bash "$@"
}

newest_checkpoint() { find "$1" -maxdepth 1 -name 'checkpoint-[0-9]*.pth' ! -name '*-step*' | sort -V | tail -n 1; }

# run_unit NAME METHOD RATIO SEED FLAGS...: in a subshell. DATA_PATH, DATA_SET: of pre-training; TO_SET, TO_PATH: of the
# fine-tuning where it is another, TO its name.
run_unit() {
    local folder=$OUTPUT/$1 method=$2 script stopped=
    trap stopped=1 TERM USR1 # the program saves itself; this shell waits for it, and starts no other
    export MASK_RATIO=$3 SEED=$4
    shift 4
    case $method in
        tube) script=pretrain_videomae.sh ;;
        random | adamae | tats) script=pretrain_$method.sh ;;
        listwise) script=pretrain_tats.sh && export TATS_OBJECTIVE=listwise ;;
        hide) script=pretrain_tats.sh && export TATS_OBJECTIVE=listwise TATS_TAU=-${TATS_TAU:-0.1} ;;
        scratch) script= ;;
        frame | motion) script=pretrain_random.sh && set -- --mask_type "$method" "$@" ;;
    esac
    local evaluation missing="" finished="" checkpoint=none
    for evaluation in $EVALUATIONS; do
        [ -f "$folder/$evaluation${TO:+_$TO}/test.json" ] || missing+=" $evaluation"
    done
    if [ -n "$script" ]; then
        if [ -n "${MEASURE:-}" ]; then
            [ ! -f "$folder/pretrain/measures.json" ] || finished=1
        elif [ -n "${EVALUATIONS// /}" ]; then
            finished=1
        fi
        [ -z "$missing" ] || finished=
        # shellcheck disable=SC2086  # the extra flags are several words
        EPOCHS=${PRETRAIN_EPOCHS:-${EPOCHS:-}} DATA_PATH=$DATA_PATH/train.csv \
            step "$folder/pretrain" "$finished" "scripts/$DATA_SET/$script" "$@" ${PRETRAIN_EXTRA:-} || return
        checkpoint=$(newest_checkpoint "$folder/pretrain") || true # removed, of a finished unit
        if [ -n "${MEASURE:-}" ] && [ -z "$finished$stopped" ]; then
            "$(interpreter)" tools/measure.py "$folder/pretrain" --data_path "$DATA_PATH" || return
        fi
    fi
    for evaluation in $EVALUATIONS; do
        local probe="" epochs=${FINETUNE_EPOCHS:-${EPOCHS:-}} data=${TO_PATH:-$DATA_PATH}
        if [ "$evaluation" != finetune ]; then probe=--$evaluation epochs=${PROBE_EPOCHS:-${EPOCHS:-}}; fi
        finished=1
        case "$missing " in *" $evaluation "*) finished= ;; esac
        # shellcheck disable=SC2086
        EPOCHS=$epochs MODEL_PATH=$checkpoint DATA_PATH=$data step "$folder/$evaluation${TO:+_$TO}" "$finished" \
            "scripts/${TO_SET:-$DATA_SET}/finetune.sh" $probe ${FINETUNE_EXTRA:-} || return
    done
}

# check_units: before any of them starts.
check_units() {
    local unit words
    local -A known=()
    [ "${#UNITS[@]}" -gt 0 ] || refuse "no units: METHODS, MASK_RATIOS or SEEDS is empty"
    for unit in "${UNITS[@]}"; do
        eval "words=($unit)"
        [ -z "${known[${words[0]}]:-}" ] || refuse "${words[0]}: twice, METHODS, MASK_RATIOS or SEEDS repeat a word"
        known[${words[0]}]=1
        [[ ${words[2]} =~ ^0?\.[0-9]*[1-9][0-9]*$ ]] || refuse "MASK_RATIOS=${words[2]}: must be between 0 and 1"
        [[ ${words[3]} =~ ^[0-9]{1,9}$ ]] || refuse "SEEDS=${words[3]}: must be a whole number of at least 0"
    done
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [ "$SLURM_ARRAY_TASK_ID" -ge "${#UNITS[@]}" ]; then
        refuse "there are ${#UNITS[@]} units, none with number $SLURM_ARRAY_TASK_ID: use --array=0-$((${#UNITS[@]} - 1))"
    fi
}

# share_gpus: JOBS where it is not set (of small models as many as fit: CPU_JOBS on the CPU), and SHARES, the
# CUDA_VISIBLE_DEVICES of each of JOBS units, where several use GPUs.
share_gpus() {
    local devices count gpus job
    IFS=, read -ra devices <<< "$(visible_gpus)"
    SHARES=() count=${#devices[@]} gpus=${GPUS:-${#devices[@]}}
    if [ -z "${JOBS:-}" ]; then
        JOBS=${CPU_JOBS:-1}
        if [ "$gpus" -gt 0 ] && [ "$JOBS" -gt 1 ]; then JOBS=$((count > gpus ? count / gpus : 1)); fi
    fi
    if [ "$JOBS" -eq 1 ] || [ "$gpus" -eq 0 ]; then return; fi
    [ "$count" -ge $((gpus == 1 ? 1 : JOBS * gpus)) ] ||
        refuse "JOBS=$JOBS units with GPUS=$gpus each: this machine has $count: set GPUS, of each unit, or JOBS to less"
    for ((job = 0; job < JOBS; job++)); do SHARES+=("$(IFS=, && echo "${devices[*]:job * gpus % count:gpus}")"); done
}

# stop_units: their programs are told to stop and save themselves; a sweep that was stopped leaves nothing running.
stop_units() {
    local job
    for job in $(jobs -p); do kill -TERM -- "-$job" 2>/dev/null || true; done
    { wait; } 2>/dev/null # bash tells of each job that was stopped
    echo "stopped; start the same command again to continue" >&2
    exit 143
}

# run_units NAME FLAGS...: all units, or Slurm's one of them; then the table, with flags for tools/compare_runs.py.
run_units() {
    OUTPUT=${OUTPUT_DIR:-$REPOSITORY/output/compare/$1}
    shift
    check_units
    [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || share_gpus
    if [ -n "${LIST:-}${DRY_RUN:-}" ]; then
        printf '%s\n' "${UNITS[@]}"
        exit
    fi
    if [ "$DATA_SET" = shapes ]; then (source scripts/shapes/data.sh && write_shapes "$DATA_PATH") || exit; fi
    local unit words status running slot failed=$OUTPUT/failed.txt pids=()
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        eval "words=(${UNITS[$SLURM_ARRAY_TASK_ID]})"
        run_unit "${words[@]}"
        exit
    fi
    rm -f "$failed"
    set -m # each unit its own process group, which stop_units can reach
    trap stop_units TERM INT HUP
    for unit in "${UNITS[@]}"; do
        while [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; do wait -n || true; done
        running=" $(jobs -rp | xargs) " slot=0
        while [[ -n ${pids[slot]:-} && $running == *" ${pids[slot]} "* ]]; do slot=$((slot + 1)); done
        eval "words=($unit)"
        mkdir -p "$OUTPUT/${words[0]}"
        (
            trap : TERM # outlive it
            if [ ${#SHARES[@]} -gt 0 ]; then export CUDA_VISIBLE_DEVICES=${SHARES[slot]}; fi
            status=0
            (run_unit "${words[@]}") >> "$OUTPUT/${words[0]}/log.txt" 2>&1 < /dev/null || status=$?
            if [ $status -eq 0 ]; then
                echo "$(date +%T) ${words[0]}: finished"
            else
                echo "$(date +%T) ${words[0]}: status $status, see $OUTPUT/${words[0]}/log.txt" \
                    "$(tail -n 20 "$OUTPUT/${words[0]}/log.txt" | grep ^error: | tail -n 1)" | tee -a "$failed"
            fi
        ) &
        pids[slot]=$!
    done
    wait
    trap - TERM INT HUP
    set +m
    "$(interpreter)" tools/compare_runs.py "$OUTPUT" --output "$OUTPUT" "$@" || return
    [ ! -f "$failed" ]
}
