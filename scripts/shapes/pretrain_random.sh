#!/usr/bin/env bash
# Random space-time masks (ST-MAE) on the embedded data set: bash scripts/shapes/pretrain_random.sh [flags]
# Settings by environment and flags: scripts/common.sh; next to them, data and scale are set by scripts/shapes/data.sh.
source "$(dirname "${BASH_SOURCE[0]}")/data.sh"
pretrain shapes_random --mask_type random --sampling_rate 2 "$@"
