#!/bin/sh
# 50,000 pictures on a Ray cluster whose nodes have fastddpm: ray_job.sh http://HEAD:8265 s3://bucket/cifar10
# An actor for each GPU of the cluster draws, nodes may be lost and may join. Without GPUs: --cpus-per-worker 4, say.
ray job submit --address "${1:?address of the dashboard}" -- \
  fastddpm sample google/ddpm-cifar10-32 -n 50000 --shards "${2:?OUT}" --ray auto
