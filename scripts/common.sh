# Sourced by the scripts in the folders beside it. Settings come from the environment, further flags of the Python
# script from the command line; what comes last wins.
#
#   DATA_PATH    list file of the videos (required); fine-tuning: folder with train.csv and val.csv, or a list
#   MODEL_PATH   fine-tuning: checkpoint to start from (required; none: train from scratch)
#   OUTPUT_DIR   default output/<name of the script's run>
#   GPUS         processes on this node; 0 = CPU (default: the GPUs of CUDA_VISIBLE_DEVICES, else those nvidia-smi lists)
#   NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several nodes: the same command on each with its own NODE_RANK
#   NODES, RDZV_ENDPOINT=host:port   or: the same command on all, which meet at a port of one of them, another port for
#                each run, and number themselves; LOCAL_ADDR where a node's name does not lead the others to it
#   PYTHON       interpreter (default: python3 of an active environment, else .venv's, else python3)
#   MODEL  MASK_RATIO  BATCH_SIZE (videos per process)  NUM_SAMPLE  ACCUM_ITER  EPOCHS  WARMUP_EPOCHS  LR  NUM_WORKERS  SAVE_FREQ
#   SEED
#   SCALE        paper (default: ViT-B, 16 frames of 224 x 224) or tiny: a model of 0.6 M weights, 8 frames of INPUT_SIZE
#                (64), large learning rates, minutes on a CPU
#   TATS_OBJECTIVE   ppo (default, the paper's) or listwise, with TATS_TAU (docs/SAMPLER.md)
#   TATS_START_EPOCH  TATS_LR  ENTROPY_COEF  TATS_LOGIT_CAP
#   DRY_RUN=1    print the command instead of running it
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/checks.sh"
need_whole EPOCHS 1
need_whole GPUS 0
need_whole NODES 1
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$REPOSITORY/.venv/bin/python" ] && PYTHON=$REPOSITORY/.venv/bin/python
fi

# launch SCRIPT FLAGS...: one plain process for GPUS 0 or 1, or where torchrun, srun or mpirun (MASTER_ADDR and MASTER_PORT set)
# started the processes; else torchrun. It takes the place of this shell, which would die of a signal meant for Python: nothing
# after it runs.
launch() {
    local script=$REPOSITORY/$1
    shift
    local gpus=${GPUS:-$(count_gpus)} nodes=${NODES:-1}
    local command=("$PYTHON")
    if [ -z "${RANK:-}${OMPI_COMM_WORLD_RANK:-}" ] && [ "${SLURM_STEP_NUM_TASKS:-1}" -le 1 ] &&
        { [ "$gpus" -gt 1 ] || [ "$nodes" -gt 1 ]; }; then
        export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 # what torchrun passes on to the processes
        command+=(-m torch.distributed.run --nproc_per_node "$((gpus > 0 ? gpus : 1))" --nnodes "$nodes")
        if [ -n "${RDZV_ENDPOINT:-}" ]; then
            command+=(--rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "${SLURM_JOB_ID:-tats}")
            if [ -n "${LOCAL_ADDR:-}" ]; then
                local host=0
                [ "${RDZV_ENDPOINT%:*}" != "$LOCAL_ADDR" ] || host=1
                command+=(--local_addr "$LOCAL_ADDR" --rdzv_conf "is_host=$host")
            fi
        elif [ "$nodes" -eq 1 ] && [ -z "${MASTER_PORT:-}" ]; then
            command+=(--standalone --local_addr 127.0.0.1) # a free port: there may be another run on this machine
        else
            command+=(--node_rank "${NODE_RANK:-0}"
                --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}")
        fi
    fi
    command+=("$script" "$@")
    if [ -n "${OMPI_COMM_WORLD_RANK:-}" ] && [ -z "${RANK:-}" ]; then command+=(--dist_on_itp); fi
    if [ "$gpus" -eq 0 ]; then command+=(--device cpu); fi
    if [ -n "${DRY_RUN:-}" ]; then
        printf '%s\n' "${command[@]}"
    else
        exec "${command[@]}"
    fi
}

need_data() {
    if [ -z "${DATA_PATH:-}" ]; then
        echo "error: set DATA_PATH to the list of training videos (a line per video: path label), e.g." >&2
        echo "  DATA_PATH=/data/train.csv bash $0" >&2
        exit 2
    fi
}

# What depends on the scale. A run of minutes needs large learning rates, the sampler too, and TATS once the loss has left
# its plateau (docs/SAMPLER.md).
ENCODER_FLAGS=() # of fine-tuning, not of a probe, whose encoder is frozen and whose clips are hardly changed
case ${SCALE:-paper} in
    paper)
        PRETRAIN_FLAGS=(--model "${MODEL:-pretrain_videomae_base_patch16_224}" --decoder_depth 4 --num_frames 16
            --batch_size "${BATCH_SIZE:-32}" --num_sample "${NUM_SAMPLE:-1}" --lr "${LR:-1.5e-4}"
            --warmup_epochs "${WARMUP_EPOCHS:-40}" --epochs "${EPOCHS:-400}"
            --save_ckpt_freq "${SAVE_FREQ:-20}" --num_workers "${NUM_WORKERS:-8}")
        # The paper's settings of TATS (table 4).
        TATS_FLAGS=(--mask_type tats --tats_attention orthoformer --tats_blocks 1 --num_landmarks 128 --softmax_temp 1
            --tats_lr "${TATS_LR:-1.5e-6}" --tats_start_epoch "${TATS_START_EPOCH:-10}" --tats_rollout_steps 1 --ppo_epochs 1
            --ppo_clip 0.2 --policy_coef 1e-4 --value_coef 1e-4 --entropy_coef "${ENTROPY_COEF:-1e-4}"
            --tats_logit_cap "${TATS_LOGIT_CAP:-0}")
        # Of the paper's table 7; what it shares with the defaults of the flags (layer decay, label smoothing, mixup,
        # cutmix, drop path, weight decay) is not repeated, so that --linear_probe brings its own.
        FINETUNE_FLAGS=(--model "${MODEL:-vit_base_patch16_224}" --num_frames 16
            --batch_size "${BATCH_SIZE:-8}" --num_sample "${NUM_SAMPLE:-1}" --lr "${LR:-1e-3}"
            --warmup_epochs "${WARMUP_EPOCHS:-5}" --epochs "${EPOCHS:-100}"
            --save_ckpt_freq "${SAVE_FREQ:-10}" --num_workers "${NUM_WORKERS:-8}")
        ENCODER_FLAGS=(--aa rand-m9-mstd0.5-inc1)
        ;;
    tiny)
        EPOCHS=${EPOCHS:-20}
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # so small a step gains nothing from a second thread (docs/LOG.md)
        PRETRAIN_FLAGS=(--model "${MODEL:-pretrain_videomae_tiny_patch8_64}" --input_size "${INPUT_SIZE:-64}"
            --decoder_depth 2 --num_frames 8 --batch_size "${BATCH_SIZE:-4}" --num_sample "${NUM_SAMPLE:-4}"
            --lr "${LR:-1.28e-1}" --min_lr 0 --warmup_epochs "${WARMUP_EPOCHS:-1}" --epochs "$EPOCHS"
            --save_ckpt_freq "${SAVE_FREQ:-1000}" --num_workers "${NUM_WORKERS:-1}" --print_freq 50)
        TATS_FLAGS=(--mask_type tats --tats_attention trajectory --tats_start_epoch "${TATS_START_EPOCH:-$((EPOCHS / 2))}"
            --tats_lr "${TATS_LR:-2e-4}")
        if [ "${TATS_OBJECTIVE:-ppo}" = ppo ]; then
            TATS_FLAGS+=(--entropy_coef "${ENTROPY_COEF:-1e-5}" --normalize_advantage --tats_logit_cap "${TATS_LOGIT_CAP:-2}")
        fi
        FINETUNE_FLAGS=(--model "${MODEL:-vit_tiny_patch8_64}" --input_size "${INPUT_SIZE:-64}" --num_frames 8
            --batch_size "${BATCH_SIZE:-4}" --num_sample "${NUM_SAMPLE:-4}" --lr "${LR:-6.4e-2}"
            --crop_scale 0.5 1 --aa none --color_jitter 0 --reprob 0 --mixup 0 --cutmix 0 --smoothing 0
            --clip_grad 1 --warmup_epochs "${WARMUP_EPOCHS:-1}" --epochs "$EPOCHS"
            --save_ckpt_freq "${SAVE_FREQ:-1000}" --num_workers "${NUM_WORKERS:-1}" --print_freq 50)
        ENCODER_FLAGS=(--init_scale 1 --layer_decay 0.9)
        ;;
    *)
        echo "error: SCALE=$SCALE: choose paper or tiny" >&2
        exit 2
        ;;
esac

if [ "${TATS_OBJECTIVE:-ppo}" != ppo ]; then
    TATS_FLAGS+=(--tats_objective "$TATS_OBJECTIVE" --tats_tau "${TATS_TAU:-0.1}")
fi

# pretrain NAME FLAGS...: the recipe of the paper's tables 4 and 8 for every method and data set.
pretrain() {
    local name=$1
    shift
    need_data
    local output=${OUTPUT_DIR:-$REPOSITORY/output/$name}
    launch run_mae_pretraining.py \
        --data_path "$DATA_PATH" \
        --output_dir "$output" \
        --log_dir "$output" \
        "${PRETRAIN_FLAGS[@]}" \
        --mask_ratio "${MASK_RATIO:-0.95}" \
        --accum_iter "${ACCUM_ITER:-1}" \
        --crop multiscale \
        --opt adamw \
        --opt_betas 0.9 0.95 \
        --weight_decay 0.05 \
        --seed "${SEED:-0}" \
        "$@"
}

# finetune NAME SEGMENTS CROPS FLAGS...: the recipe of the paper's table 7, and the views of the test.
finetune() {
    local name=$1 initial=() views=(--test_num_segment "$2" --test_num_crop "$3")
    shift 3
    need_data
    if [ -z "${MODEL_PATH:-}" ]; then
        echo "error: set MODEL_PATH to the checkpoint to fine-tune, or to none to train from scratch, e.g." >&2
        echo "  MODEL_PATH=output/ssv2_tats/checkpoint-399.pth DATA_PATH=/data/ssv2 bash $0" >&2
        exit 2
    fi
    # one folder for each starting point and mode: if a folder contains a run, it is resumed
    local flag from=scratch
    for flag in "$@"; do
        case $flag in
            --linear_probe | --attentive_probe) name=${name/finetune/${flag#--}} ENCODER_FLAGS=() ;;
            --knn | --knn=*) name=${name/finetune/knn} ENCODER_FLAGS=() views=() ;;
        esac
    done
    if [ "$MODEL_PATH" != none ]; then
        initial=(--finetune "$MODEL_PATH")
        from=$(basename "$MODEL_PATH" .pth)
        case $from in checkpoint-*) from=$(basename "$(dirname "$MODEL_PATH")") ;; esac
    fi
    local output=${OUTPUT_DIR:-$REPOSITORY/output/${name}_from_$from}
    launch run_class_finetuning.py \
        --data_path "$DATA_PATH" \
        --output_dir "$output" \
        --log_dir "$output" \
        "${initial[@]}" \
        "${FINETUNE_FLAGS[@]}" \
        "${ENCODER_FLAGS[@]}" \
        --accum_iter "${ACCUM_ITER:-1}" \
        --opt adamw \
        --opt_betas 0.9 0.999 \
        --seed "${SEED:-0}" \
        "${views[@]}" \
        "$@"
}
