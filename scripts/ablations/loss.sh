#!/usr/bin/env bash
# The paper's table 3: loss and target.
# bash scripts/ablations/loss.sh; DATA_SET, SCALE, SEEDS and all else: scripts/compare/sweep.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../compare/sweep.sh"
for loss in l1 mse; do
    add_variants "$loss-normalised" --loss "$loss" --normalize_target
    add_variants "$loss-raw" --loss "$loss" --no-normalize_target
done
run_units "ablations_$DATA_SET/loss" --by loss normalize_target --paper table3 "$@"
