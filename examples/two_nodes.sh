#!/usr/bin/env bash
# Training on two nodes, with the YAML of a single one. Run it on both, at about the same time:
#
#   MASTER_ADDR=10.0.0.1 NODE_RANK=0 bash two_nodes.sh --config run.yaml   # on the node with that address
#   MASTER_ADDR=10.0.0.1 NODE_RANK=1 bash two_nodes.sh --config run.yaml   # on the other one
#
# GPUS says how many processes each node starts (default: 8), STRATEGY is hift_ddp (default) or hift_fsdp, MASTER_PORT is a
# free port of the first node. Code, YAML, data and ckpt_path must be the same on both. With hift_ddp the first node writes
# checkpoints; with hift_fsdp both do, into one folder that both must see.
set -euo pipefail
: "${MASTER_ADDR:?set it to the address of the first node}"
: "${NODE_RANK:?set it to 0 on the first node and to 1 on the other one}"
GPUS=${GPUS:-8}

torchrun --nnodes 2 --node_rank "$NODE_RANK" --nproc_per_node "$GPUS" \
  --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" \
  -m lightning_hift fit "$@" \
  --trainer.strategy "${STRATEGY:-hift_ddp}" --trainer.num_nodes 2 --trainer.devices "$GPUS"
