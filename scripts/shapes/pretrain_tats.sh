#!/usr/bin/env bash
# TATS on the embedded data set: bash scripts/shapes/pretrain_tats.sh [flags]
# Settings by environment and flags: scripts/common.sh; next to them, data and scale are set by scripts/shapes/data.sh.
source "$(dirname "${BASH_SOURCE[0]}")/data.sh"
pretrain shapes_tats "${TATS_FLAGS[@]}" --sampling_rate 2 "$@"
