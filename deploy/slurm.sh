#!/usr/bin/env bash
# Stage 2 of 7B on two nodes of eight GPUs: SHARED=FOLDER sbatch deploy/slurm.sh.  Run it in this repository, on a disk
# that all nodes see, with `.[cuda,train]` installed into .venv; see docs/tpu-pod.md.
#SBATCH --job-name=stage2
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

# One process per GPU, which JAX finds from Slurm's variables.
# A process that ends must not kill the others, which may be saving.
srun --kill-on-bad-exit=0 .venv/bin/llamavid-train --distributed --config=configs/stage2_instruct.yaml \
  data.path="$SHARED/data/chat" start.model="$SHARED/start/vicuna-7b-start" start.adapter="$SHARED/start/adapter" \
  output="$SHARED/runs/stage2" mesh=fsdp=16 training.micro_batches=2 training.save_every=200
code=$?
if [ $code -ne 0 ] && [ $code -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 50 ]; then  # neither complete nor bad input
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
