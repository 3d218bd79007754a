#!/usr/bin/env bash
# The paper's table 3: trajectory attention blocks in TATS.
# bash scripts/ablations/tats_blocks.sh; DATA_SET, SCALE, SEEDS and all else: scripts/compare/sweep.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../compare/sweep.sh"
for blocks in 1 2 3; do add_variants "blocks$blocks" --tats_blocks "$blocks"; done
run_units "ablations_$DATA_SET/tats_blocks" --by tats_blocks --paper table3 "$@"
