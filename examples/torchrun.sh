#!/bin/sh
# 50,000 pictures on the eight GPUs of one machine. RANK and WORLD_SIZE say where a process begins, LOCAL_RANK picks its GPU.
# On several machines: --nnodes, --node_rank and --master_addr as usual; OUT must be a place that all of them reach.
# The same command continues a run that was stopped.
torchrun --nproc_per_node 8 --no_python fastddpm sample google/ddpm-cifar10-32 -n 50000 --shards "${1:?OUT}"
