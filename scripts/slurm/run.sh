#!/usr/bin/env bash
# What the .sbatch files share: run.sh SCRIPT FLAGS... starts the script in every task of the job, and puts the job back
# into the queue where the run was told to stop and saved itself (exit status 75).
set -euo pipefail

# One task. Slurm sends its signals to all processes of a step, so that Python gets them beside this shell.
if [ "${1:-}" = --task ]; then
    shift
    trap : TERM USR1 # outlive it
    status=0
    bash "$@" || status=$?
    case $status in
        0) ;;
        # Stopped and saved, or hit (128 + signal) before it could catch the signal. Others may be on their way out:
        # --kill-on-bad-exit would end them by a signal, and srun returns the largest status.
        75 | 138 | 143)
            sleep 5 || true
            status=75
            ;;
        # A crash counts more than those it takes along, which get a SIGTERM: it must not start the job again and again.
        *) status=$((status < 156 ? 100 + status : status)) ;;
    esac
    exit "$status"
fi

if ! [ -f "${1:-}" ]; then
    echo "error: ${1:-no script}: not a file seen from $PWD; submit in the repository's root, e.g." >&2
    echo "  sbatch scripts/slurm/pretrain.sbatch scripts/ssv2/pretrain_tats.sh" >&2
    exit 2
fi
status=0
# since Slurm 22.05 srun does not take over --cpus-per-task of the job
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
srun --kill-on-bad-exit=1 bash "$SLURM_SUBMIT_DIR/scripts/slurm/run.sh" --task "$@" || status=$?
if [ "$status" -eq 75 ]; then
    echo "the run was told to stop: job $SLURM_JOB_ID goes back to the queue"
    scontrol requeue "$SLURM_JOB_ID" # ends this shell
fi
exit "$status"
