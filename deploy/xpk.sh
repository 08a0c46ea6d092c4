#!/usr/bin/env bash
# Stage 2 of 7B on a slice of 64 v5e chips, as a workload of XPK; docs/tpu-pod.md sets the variables.
set -euo pipefail

# XPK wraps the one-line command in a shell and signals that shell; `exec` replaces the shell by the run.
xpk workload create --workload=stage2 --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" \
  --tpu-type=v5litepod-64 --docker-image="$IMAGE" --priority=medium \
  --max-restarts=50 --restart-on-exit-codes=1,75 --termination-grace-period-seconds=600 \
  --command="exec llamavid-train --distributed --config=configs/stage2_instruct.yaml \
    data.path=gs://$BUCKET/data/chat start.model=gs://$BUCKET/start/vicuna-7b-start start.adapter=gs://$BUCKET/start/adapter \
    output=gs://$BUCKET/runs/stage2 mesh=fsdp=32,sequence=2 training.micro_batches=1 training.save_every=200"
