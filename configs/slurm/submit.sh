#!/bin/sh
# Pretrain under SLURM, on 2 nodes with 8 GPUs each, and go on by itself until the run is complete:
#   sbatch submit.sh -c swin_base_800ep --data.root DIR
# Two minutes before its time is over the job saves its state and is put into the queue again; the
# same happens where a node fails. It then goes on in the run's own folder.
#SBATCH --job-name=simmim
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=SIGUSR1@120

# Where one process dies SLURM ends the others, which would wait for it.
exec srun --kill-on-bad-exit=1 simmim "${TASK:-pretrain}" fit "$@" -c slurm \
  --trainer.num_nodes "$SLURM_JOB_NUM_NODES"
