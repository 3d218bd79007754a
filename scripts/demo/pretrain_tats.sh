#!/usr/bin/env bash
# The demo: writes the embedded data set, pre-trains TATS on it from scratch, draws what the sampler chose.
# About 4 minutes on 2 CPU cores. OUTPUT_DIR (default output/demo), PYTHON and further flags as in the other scripts.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
output=${OUTPUT_DIR:-$REPOSITORY/output/demo}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as the tiny scale

[ -n "${DRY_RUN:-}" ] || "$PYTHON" "$REPOSITORY/datasets/moving_shapes.py" --output "$output/data"

# Random masks until the loss is clearly below 1 (epoch 9), then TATS. Unlike the paper's settings (scripts/common.sh) a run
# of minutes needs a larger --tats_lr, and --tats_objective listwise chooses sharply without collapse (docs/SAMPLER.md).
( # launch ends its shell
GPUS=0 launch run_mae_pretraining.py \
    --data_path "$output/data/train.csv" \
    --output_dir "$output/tats" \
    --model pretrain_videomae_tiny_patch8_64 \
    --input_size 32 \
    --num_frames 8 \
    --sampling_rate 2 \
    --decoder_depth 2 \
    --mask_type tats \
    --mask_ratio 0.75 \
    --tats_attention trajectory \
    --tats_start_epoch 9 \
    --tats_lr 5e-4 \
    --tats_objective listwise \
    --batch_size 4 \
    --num_sample 4 \
    --opt_betas 0.9 0.95 \
    --lr 1.28e-1 \
    --min_lr 0 \
    --warmup_epochs 1 \
    --epochs 40 \
    --save_ckpt_freq 10 \
    --print_freq 40 \
    --num_workers 1 \
    "$@"
)

[ -z "${DRY_RUN:-}" ] || exit 0
"$PYTHON" "$REPOSITORY/run_mae_vis.py" \
    --model_path "$output/tats" --data_path "$output/data/val.csv" --num_videos 6 --output_dir "$output/pictures"
"$PYTHON" - "$output/tats/log.txt" <<'PY'
import json, sys

epochs = [json.loads(line) for line in open(sys.argv[1])]
warm_up = [epoch for epoch in epochs if "train_entropy" not in epoch]
for label, epoch in (*(("last epoch of random masks", epoch) for epoch in warm_up[-1:]), ("last epoch of TATS", epochs[-1])):
    print(f"{label}: loss {epoch['train_loss']:.3f} (1 = predicting the mean), "
          f"motion lift {epoch['train_motion_lift']:.2f} (1 = blind to motion)")
PY
