#!/usr/bin/env bash
# VideoMAE (tube masks) on the embedded data set: bash scripts/shapes/pretrain_videomae.sh [flags]
# Settings by environment and flags: scripts/common.sh; next to them, data and scale are set by scripts/shapes/data.sh.
source "$(dirname "${BASH_SOURCE[0]}")/data.sh"
pretrain shapes_videomae --mask_type tube --sampling_rate 2 "$@"
