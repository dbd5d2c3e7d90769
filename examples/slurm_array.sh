#!/bin/sh
#SBATCH --job-name=fastddpm
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=01:00:00
#SBATCH --requeue
# 50,000 pictures by eight tasks: sbatch slurm_array.sh OUT, where OUT is a folder that all nodes see, or a URL.
# A task begins with its part of the shards and then helps the others; one that is killed loses the shard it was at.
fastddpm sample google/ddpm-cifar10-32 -n 50000 --shards "${1:?OUT}"
