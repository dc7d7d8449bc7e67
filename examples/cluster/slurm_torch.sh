#!/usr/bin/env bash
# SLURM: torch, two machines, one process a GPU. Written from the documentation of both; not run by
# us on a cluster. Submit: sbatch examples/cluster/slurm_torch.sh
#SBATCH --job-name=metaframe
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
# The whole job is put back in the queue when a machine is lost; it then goes on from the last
# checkpoint, see below.
#SBATCH --requeue
set -euo pipefail

run=${RUN:-runs/omniglot}   # on a file system that all machines share
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Without it a restarted process reads the address of a dead one (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

command=(train --preset omniglot-5w1s-maml --backend torch --out "$run")
[[ -f $run/config.toml ]] && command=(resume "$run")

srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 4 --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
  -m metaframe.cli "${command[@]}"
