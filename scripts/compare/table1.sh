#!/usr/bin/env bash
# The paper's table 1: methods at three mask ratios, fine-tuned where they were pre-trained; and its table 9, where DATA_PATH is
# the whole of SSv2 (add --paper table9). Settings: scripts/compare/sweep.sh.
#   DATA_SET=ucf101 DATA_PATH=lists/ucf101 bash scripts/compare/table1.sh
source "$(dirname "${BASH_SOURCE[0]}")/sweep.sh"
MASK_RATIOS=${MASK_RATIOS:-0.85 0.9 0.95}
add_methods
reported=() # beside the paper's own data sets
if [ -n "${PAPER_NAME[$DATA_SET]:-}" ] && [ ${#BY[@]} -eq 0 ] && [[ " $* " != *" --paper"[\ =]* ]]; then
    reported=(--paper table1 --data_set "${PAPER_NAME[$DATA_SET]}")
fi
run_units "table1_$DATA_SET" "${BY[@]}" --baseline "$BASELINE" "${reported[@]}" "$@"
