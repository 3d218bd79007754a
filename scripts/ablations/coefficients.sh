#!/usr/bin/env bash
# The paper's table 6: (c_p, c_v, c_e), of policy, value and entropy; its eighth row, printed twice, once.
# bash scripts/ablations/coefficients.sh; DATA_SET, SCALE, SEEDS and all else: scripts/compare/sweep.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../compare/sweep.sh"
for row in 1e-4,1e-3,1e-3 1e-4,1e-3,1e-4 1e-4,1e-4,1e-3 1e-3,1e-4,1e-4 1e-4,1e-4,1e-4 1e-5,1e-4,1e-4 1e-3,1e-3,1e-4 1e-5,1e-5,1e-5; do
    IFS=, read -r policy value entropy <<< "$row"
    add_variants "$row" --policy_coef "$policy" --value_coef "$value" --entropy_coef "$entropy"
done
run_units "ablations_$DATA_SET/coefficients" --by policy_coef value_coef entropy_coef --paper table6 "$@"
