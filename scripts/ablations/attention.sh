#!/usr/bin/env bash
# The paper's table 3: kind of attention in TATS.
# bash scripts/ablations/attention.sh; DATA_SET, SCALE, SEEDS and all else: scripts/compare/sweep.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../compare/sweep.sh"
for kind in mha orthoformer trajectory; do add_variants "$kind" --tats_attention "$kind"; done
run_units "ablations_$DATA_SET/attention" --by tats_attention --paper table3 "$@"
