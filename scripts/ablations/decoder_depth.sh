#!/usr/bin/env bash
# The paper's table 3: blocks of the decoder.
# bash scripts/ablations/decoder_depth.sh; DATA_SET, SCALE, SEEDS and all else: scripts/compare/sweep.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../compare/sweep.sh"
for depth in 1 2 4 8; do add_variants "depth$depth" --decoder_depth "$depth"; done
run_units "ablations_$DATA_SET/decoder_depth" --by decoder_depth --paper table3 "$@"
