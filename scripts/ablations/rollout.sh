#!/usr/bin/env bash
# The paper's table 5: (e, k), epochs before TATS and steps per phase 1; EK says others, as "0,1 3,1".
# bash scripts/ablations/rollout.sh; DATA_SET, SCALE, SEEDS and all else: scripts/compare/sweep.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../compare/sweep.sh"
if [ "$DATA_SET" = shapes ]; then EK=${EK:-0,1 1,1 2,1 3,1 2,5 2,25}; fi # of 4 epochs
EK=${EK:-0,1 1,1 5,1 10,1 25,1 100,1 50,5 50,10 50,25}
for pair in $EK; do
    add_variants "e${pair%,*}-k${pair#*,}" --tats_start_epoch "${pair%,*}" --tats_rollout_steps "${pair#*,}"
done
run_units "ablations_$DATA_SET/rollout" --by tats_start_epoch tats_rollout_steps --paper table5 \
    --data_set "$([ "$DATA_SET" = hmdb51 ] && echo HMDB51 || echo UCF101)" "$@"
