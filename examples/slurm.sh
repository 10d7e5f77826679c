#!/bin/bash
# Train on several machines under Slurm: sbatch examples/slurm.sh CONFIG.yaml [key.path=value ...]
# A job that is preempted, or reaches its time limit, saves its last finished step, goes back into the queue and goes on
# from there: its number, and so its run directory, stay the same. See docs/many_machines.md.
#SBATCH --job-name=vpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300

run_dir=${RUN_DIR:-runs/slurm-$SLURM_JOB_ID} # on a disk that all machines share
grace=${GRACE:-240}                          # seconds for the last save; less than the 300 above, and than GraceTime
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$first:${PORT:-29500}" \
    --max-restarts=3 --shutdown-timeout="$grace" \
    -m vpo_engine.train "$@" run_dir="$run_dir" &
training=$!

stopped=
trap 'stopped=1; kill -TERM $training' TERM
wait $training
code=$?
if [ -n "$stopped" ]; then
    wait $training # the trap ended the first wait before the run had saved
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit $code
