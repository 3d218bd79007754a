#!/usr/bin/env bash
# How many samplers collapse: objectives x learning rates x seeds, each from the same autoencoder (MODEL_PATH, pre-trained with
# random masks). bash scripts/compare/collapse.sh; counts collapsed runs (contrast above 5 or entropy below 0.7, means of the last
# epoch).
# Settings: scripts/compare/sweep.sh. About 25 seconds per run on one core: 30 runs per objective.
export PRETRAIN_EPOCHS=${PRETRAIN_EPOCHS:-1} BATCH_SIZE=${BATCH_SIZE:-4} NUM_SAMPLE=${NUM_SAMPLE:-1} TATS_START_EPOCH=0
export CPU_JOBS=$(nproc) OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} EVALUATIONS= MEASURE=
SEEDS=${SEEDS:-0 1 2 3 4 5 6 7 8 9} OBJECTIVES=${OBJECTIVES:-paper ppo uniform_kl listwise} RATES=${RATES:-5e-4 1.5e-3 5e-3}
source "$(dirname "${BASH_SOURCE[0]}")/sweep.sh"
RATIO=${MASK_RATIOS:-0.85}
[[ $RATIO != *" "* ]] || refuse "MASK_RATIOS=$RATIO: one ratio here"
MODEL_PATH=${MODEL_PATH:-$REPOSITORY/output/compare/embedded/random-ratio$RATIO-seed0/pretrain}
[ -n "${LIST:-}${DRY_RUN:-}" ] || [ -e "$MODEL_PATH" ] ||
    refuse "$MODEL_PATH: no such file: run make compare first, or set MODEL_PATH to an autoencoder's checkpoint"
need_words OBJECTIVES "paper ppo uniform_kl listwise"
for seed in $SEEDS; do
    for rate in $RATES; do
        for objective in $OBJECTIVES; do
            method=tats flags=(--tats_logit_cap 0)
            case $objective in
                paper) flags+=(--no-normalize_advantage --entropy_coef 1e-4) ;; # table 4's coefficients
                ppo) flags+=(--entropy_coef 1e-6) ;;                          # what moves within minutes
                uniform_kl) flags+=(--entropy uniform_kl --entropy_coef 2e-4) ;;
                listwise) method=listwise flags=() ;;
            esac
            add_unit "$objective-lr$rate-seed$seed" $method "$RATIO" "$seed" "${flags[@]}" --tats_lr "$rate" \
                --lr 3e-2 --warmup_epochs 0 --finetune "$MODEL_PATH"
        done
    done
done
run_units collapse --by tats_objective entropy entropy_coef normalize_advantage tats_lr "$@" || failed=1
"$(interpreter)" - "$OUTPUT" <<'PY'
import collections, json, pathlib, sys

counts = collections.defaultdict(lambda: [0, 0, 0.0, 0.0])
for log in sorted(pathlib.Path(sys.argv[1]).glob("*/pretrain/log.txt")):
    objective, rate = log.parts[-3].split("-seed")[0].split("-lr")
    last = json.loads(log.read_text().splitlines()[-1])
    row = counts[objective, float(rate)]
    row[0] += 1
    row[1] += last["train_contrast"] > 5 or last["train_entropy"] < 0.7
    row[2] += last["train_motion_lift"]
    row[3] = max(row[3], last["train_contrast"])
print("| objective | --tats_lr | runs | collapsed | mean motion lift | largest contrast |\n|---|---|---|---|---|---|")
for (objective, rate), (runs, collapsed, lift, contrast) in sorted(counts.items()):
    print(f"| {objective} | {rate:g} | {runs} | {collapsed} | {lift / runs:.2f} | {contrast:.1f} |")
PY
[ -z "${failed:-}" ]
