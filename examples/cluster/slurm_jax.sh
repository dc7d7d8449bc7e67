#!/usr/bin/env bash
# SLURM: JAX (or TensorFlow), four machines, one process each, which uses all its devices. Written
# from the documentation; not run by us on a cluster. Submit: sbatch examples/cluster/slurm_jax.sh
#SBATCH --job-name=metaframe
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=08:00:00
# JAX ends all processes when one is lost. The job is then queued again and goes on from the last
# checkpoint.
#SBATCH --requeue
set -euo pipefail

export run=${RUN:-runs/omniglot}   # on a file system that all machines share
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=$(head -n 1 <<<"$hosts") MASTER_PORT=29500 WORLD_SIZE=$SLURM_NNODES
# TensorFlow wants to know everyone; JAX does not look.
export METAFRAME_PEERS=$(sed 's/$/:29501/' <<<"$hosts" | paste -sd,)

# shellcheck disable=SC2016  # for the shell of each process
srun bash -c '
  export RANK=$SLURM_PROCID LOCAL_RANK=0
  command=(train --preset omniglot-5w1s-maml --backend jax --out "$run")
  [[ -f $run/config.toml ]] && command=(resume "$run")
  exec metaframe "${command[@]}"
'
