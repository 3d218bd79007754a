#!/usr/bin/env bash
# The paper's table 2, transfer: pre-trained on one data set, fine-tuned on another.
#   DATA_SET=k400 DATA_PATH=lists/k400 TO_SET=ucf101 TO_PATH=lists/ucf101 bash scripts/compare/table2.sh
# OUTPUT_DIR, by default that of table1.sh, whose pre-trainings serve here; the table is in table2_TO there. TO: name of the
# folders, default TO_SET.
# Settings: scripts/compare/sweep.sh.
source "$(dirname "${BASH_SOURCE[0]}")/sweep.sh"
if [ -z "${TO_SET:-}" ] || [ -z "${TO_PATH:-}" ]; then
    echo "error: set TO_SET (a folder of scripts/) and TO_PATH (a folder with train.csv and val.csv) to what is fine-tuned on" >&2
    exit 2
fi
MASK_RATIOS=${MASK_RATIOS:-0.85 0.9 0.95} TO=${TO:-$TO_SET} OUTPUT_DIR=${OUTPUT_DIR:-$REPOSITORY/output/compare/table1_$DATA_SET}
add_methods
reported=() # beside the paper's own pairs
case $DATA_SET-$TO_SET in
    k400-ucf101 | k400-hmdb51 | k400-ssv2 | ssv2-ucf101 | ssv2-hmdb51)
        [ ${#BY[@]} -gt 0 ] || reported=(--paper table2) ;;
esac
run_units "table1_$DATA_SET" "${BY[@]}" --baseline "$BASELINE" "${reported[@]}" --output "$OUTPUT_DIR/table2_$TO" "$@"
