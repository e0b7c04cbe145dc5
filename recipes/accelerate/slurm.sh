#!/usr/bin/env bash
# Several machines under SLURM: one launcher per machine, which starts one process per GPU.
#
#   sbatch recipes/accelerate/slurm.sh
#
# Edit the three places marked with an arrow. Shortly before its time is over the job saves a checkpoint and queues again;
# `--resume_from_checkpoint auto` then goes on from it.
#SBATCH --job-name=mpo
#SBATCH --nodes=4                     # <- 1. machines, GPUs of each, time and whatever your cluster asks for
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300           # five minutes before the time is over: more than a checkpoint takes to write
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch from the checkout}"
. .venv/bin/activate                  # <- 2. the environment, on a file system that all machines share
export HF_HOME="$PWD/hub"             #       models, and the reference cache, there, too

config=recipes/accelerate/zero3_multi_node.yaml # <- 3. how the model is divided, the recipe, and its changes
recipe=(recipes/llama_full.yaml --save_strategy epoch --resume_from_checkpoint auto)

address="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
port=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one machine do not meet
export config address port
export gpus=$((SLURM_NNODES * SLURM_GPUS_ON_NODE))

# shellcheck disable=SC2016 # expanded on each machine, where SLURM_NODEID says which one it is
srun --kill-on-bad-exit=1 bash -c '
    trap "" USR1 # the launcher would die of it; its processes save at the end of their step
    exec accelerate launch --config_file "$config" \
        --num_machines "$SLURM_NNODES" --num_processes "$gpus" --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$address" --main_process_port "$port" \
        scripts/train.py "$@"
' launcher "${recipe[@]}" &
steps=$!

time_is_over=
trap 'time_is_over=yes; woken=yes; scancel --signal=USR1 "$SLURM_JOB_ID"' USR1 # to the steps, not to this shell
woken=yes
while [[ $woken ]]; do # the signal, too, ends a wait
    woken=
    status=0
    wait "$steps" || status=$?
done
if [[ $status != 0 && $time_is_over ]]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
