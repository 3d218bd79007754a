#!/usr/bin/env bash
# A real Slurm on this machine, two nodes and two partitions, kept in a temporary folder: a small TATS run is preempted
# in mid-epoch, told to stop by SIGUSR1 in another, and must end with the losses of an undisturbed run; then a comparison
# as an array. Prints PASS, or SKIP where it cannot run: it needs root, slurm-wlm and munge, and installs nothing. About 3
# minutes on 2 cores.
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/common.sh"

skip() {
    echo "SKIP: $1"
    exit 0
}
[ "$(id -u)" -eq 0 ] || skip "starting Slurm's daemons needs root"
for program in munged slurmctld slurmd sbatch srun scontrol; do
    PATH=$PATH:/usr/sbin:/sbin type -P "$program" >/dev/null || skip "no $program (Debian: slurm-wlm and munge)"
done
export PATH=$PATH:/usr/sbin:/sbin
# nothing of a job or a cluster this shell belongs to
unset "${!SLURM@}" "${!SBATCH@}" "${!SRUN@}" "${!MASTER@}" RANK WORLD_SIZE LOCAL_RANK

WORK=$(mktemp -d)
DAEMONS=()

finish() {
    local status=$?
    trap - EXIT
    if [ "$status" -ne 0 ]; then
        echo "FAIL: what Slurm and the jobs said last:"
        tail -n 20 "$WORK"/*.log "$WORK"/*.out 2>/dev/null | cut -c -200 || true
    fi
    if [ "${#DAEMONS[@]}" -gt 0 ]; then
        scancel --user=root >/dev/null 2>&1 || true # else the steps outlive slurmd
        for _ in $(seq 20); do
            squeue --noheader 2>/dev/null | grep -q . || break
            sleep 1
        done
        kill "${DAEMONS[@]}" 2>/dev/null || true
        wait
    fi
    rm -rf "$WORK"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

die() {
    echo "error: $1"
    exit 1
}

# wait_for SECONDS WHAT COMMAND...: until the command succeeds.
wait_for() {
    local seconds=$1 what=$2 end=$((SECONDS + $1))
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || die "not within $seconds s: $what"
        sleep 0.3
    done
}

job_is() { scontrol show job "$1" | grep -Eq "JobState=($2) "; }
nodes_are_idle() { [ "$(sinfo --noheader --partition=low --states=idle --format=%D)" = 2 ]; }

# --- the cluster -------------------------------------------------------------------------------------------------

chmod 755 "$WORK" # munged insists on a path that others can search
mkdir "$WORK/munge" "$WORK/state"
head -c 128 /dev/urandom >"$WORK/munge/key"
chmod 400 "$WORK/munge/key"
read -r controller_port port_0 port_1 < <("$PYTHON" -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))')

# The first node has a name that resolves, as MASTER_ADDR has to.
nodes=("$(hostname -s)" "$(hostname -s)-2")
getent hosts "${nodes[0]}" >/dev/null || export MASTER_ADDR=127.0.0.1

# cred_expire: a requeued job waits until its old credentials are void, two minutes by default
cat >"$WORK/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$controller_port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$WORK/munge/socket,cred_expire=5
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool_%n
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd_%n.pid
SlurmctldLogFile=$WORK/slurmctld.log
SlurmdLogFile=$WORK/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MinJobAge=3600
SchedulerParameters=bf_interval=1,sched_interval=2
MailProg=/bin/true
NodeName=${nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port=$port_0 CPUs=1
NodeName=${nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port=$port_1 CPUs=1
PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=60 Default=YES
PartitionName=high Nodes=ALL PriorityTier=2
CONF
export SLURM_CONF=$WORK/slurm.conf

munged --foreground --force --key-file="$WORK/munge/key" --socket="$WORK/munge/socket" --pid-file="$WORK/munge/pid" \
    --seed-file="$WORK/munge/seed" --log-file="$WORK/munged.log" >"$WORK/munged.log" 2>&1 &
DAEMONS+=($!)
wait_for 20 "munged" test -S "$WORK/munge/socket"
slurmctld -D >/dev/null 2>&1 &
DAEMONS+=($!)
for node in "${nodes[@]}"; do
    slurmd -D -N "$node" >/dev/null 2>&1 &
    DAEMONS+=($!)
done
wait_for 60 "two idle nodes" nodes_are_idle
echo "$(slurmctld -V): two nodes are up"

# --- the runs ----------------------------------------------------------------------------------------------------

"$PYTHON" "$REPOSITORY/datasets/moving_shapes.py" --output "$WORK/data" --train 400 --val 10 --size 32 --frames 12

export OMP_NUM_THREADS=1 PYTHON GPUS=0 DATA_PATH=$WORK/data/train.csv
export BATCH_SIZE=2 EPOCHS=4 WARMUP_EPOCHS=1 NUM_WORKERS=1 MASK_RATIO=0.75 SAVE_FREQ=100
cd "$REPOSITORY"

# submit NAME: JOB becomes its number.
submit() {
    JOB=$(OUTPUT_DIR=$WORK/$1 sbatch --parsable --partition=low --nodes=2 --gpus-per-node=0 --ntasks-per-node=1 \
        --cpus-per-task=1 --time=30 --output="$WORK/$1.out" \
        scripts/slurm/pretrain.sbatch scripts/ssv2/pretrain_tats.sh --model pretrain_videomae_tiny_patch8_64 \
        --input_size 32 --num_frames 4 --tats_start_epoch 1 --print_freq 10)
    echo "job $JOB: $1"
}

# in_epoch NAME E: the run has done some of its steps, and has most of them before it.
in_epoch() { grep -q "^epoch $2 \[[1-3]0/100\]" "$WORK/$1.out"; }

submit undisturbed
wait_for 240 "the end of the undisturbed run" job_is "$JOB" "COMPLETED|FAILED"

job_is "$JOB" COMPLETED || die "the undisturbed run failed"

submit disturbed
wait_for 120 "epoch 1 of the disturbed run" in_epoch disturbed 1
# This job also sees whether a process that srun did not start takes the job's two tasks for its own.
high=$(sbatch --parsable --partition=high --nodes=2 --ntasks-per-node=1 --time=5 --output="$WORK/high.out" --wrap "
    $PYTHON -c \"
from types import SimpleNamespace
from utils import init_distributed
args = SimpleNamespace(device='cpu', dist_on_itp=False, dist_url='env://')
init_distributed(args)
print('processes:', args.world_size)\"")
echo "job $high: preempts job $JOB"
wait_for 90 "the end of the job of the higher partition" job_is "$high" "COMPLETED|FAILED"
grep -q '^processes: 1$' "$WORK/high.out" || die "a batch script's process takes the job's tasks for its own"
wait_for 120 "epoch 2 of the disturbed run" in_epoch disturbed 2
scancel --signal=USR1 "$JOB"
echo "job $JOB: SIGUSR1"
wait_for 240 "the end of the disturbed run" job_is "$JOB" "COMPLETED|FAILED"

job_is "$JOB" COMPLETED || die "the disturbed run failed"
scontrol show job "$JOB" | grep -q "Restarts=2 " || die "job $JOB was not started again twice"
for epoch in 1 2; do
    grep "^resumed after [1-9][0-9]* of 100 steps of epoch $epoch " "$WORK/disturbed.out" ||
        die "the run did not resume within epoch $epoch"
done

if grep -q Traceback "$WORK"/*turbed.out; then die "a traceback in the output"; fi

"$PYTHON" - "$WORK/undisturbed/log.txt" "$WORK/disturbed/log.txt" <<'PY'
import json, sys

runs = [[json.loads(line) for line in open(path)] for path in sys.argv[1:]]
for undisturbed, disturbed in zip(*runs, strict=True):
    print(f"epoch {undisturbed['epoch']}: loss {undisturbed['train_loss']} and {disturbed['train_loss']}")
    for name in undisturbed:
        if not name.endswith(("_time", "_memory")) and undisturbed[name] != disturbed[name]:
            sys.exit(f"error: {name} differs: {undisturbed[name]} and {disturbed[name]}")
PY

# a job per unit, and no table
array=$(DATA_PATH=$WORK/data OUTPUT_DIR=$WORK/array METHODS="random tube" EVALUATIONS='' MEASURE='' SEEDS=0 PRETRAIN_EPOCHS=1 \
    sbatch --parsable --array=0-1 --partition=low --nodes=1 --gpus-per-node=0 --ntasks-per-node=1 --cpus-per-task=1 --time=10 \
    --output="$WORK/array_%a.out" scripts/slurm/pretrain.sbatch scripts/compare/embedded.sh)
echo "job $array: two units of a comparison"
array_has_left() { ! squeue --noheader --jobs="$array" | grep -q .; }
wait_for 240 "the end of the array" array_has_left
[ "$(cd "$WORK/array" && echo *)" = "random-ratio0.85-seed0 tube-ratio0.85-seed0" ] || die "the array did not run its two units"
for unit in "$WORK"/array/*; do
    [ -f "$unit/pretrain/checkpoint-0.pth" ] || die "$unit has no checkpoint"
done
echo "PASS: preempted, stopped by a signal, and the same losses; an array of a comparison ($SECONDS s)"
