#!/usr/bin/env bash
# Rehearses a pod run with the tiny model, through a failure: bash deploy/rehearse.sh [gs://BUCKET/NEW_FOLDER]
# Without an address the bucket is an in-memory emulator.  Two processes stand in for two hosts.
set -euo pipefail
python -c "import grain, gcsfs, matplotlib, gcp_storage_emulator" 2> /dev/null || {
  echo 'rehearse.sh needs packages; pip install --constraint requirements.lock ".[train,gcs,demo]" gcp-storage-emulator' >&2
  exit 2
}
bucket=${1:-gs://films} work=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null || true; rm -rf "$work"' EXIT
export LLAMAVID_BUCKETS=$work/disk
if [ $# = 0 ]; then
  python -m tests.bucket "$work/disk" > "$work/emulator" & emulator=$!
  until [ -s "$work/emulator" ]; do kill -0 $emulator; sleep 0.1; done
  source "$work/emulator"
fi

# 1. Data, as shards in the bucket.
cp demo/held_out.mp4 "$work"
for n in 1 2 3 4 5 6 7 8; do
  echo '{"id": "'$n'", "video": "held_out.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat colour is the '$n'?"}, {"from": "gpt", "value": "white"}]}'
done > "$work/chat.jsonl"
python -m llamavid_jax.data.build_shards "$work/chat.jsonl" "$bucket/shards"
python -m llamavid_jax.data.validate "$bucket/shards"

# 2. Two hosts, each with its own disk.  The bucket is away for five seconds; then one host is preempted: both save.
run=(python train.py --config configs/tiny/stage2_instruct.yaml "data.path=$bucket/shards" "output=$bucket/run" training.steps=24
  "data.buckets=[{frames: 8, pairs: 8, questions: 1, tokens: 64}]")
coordinator=localhost:$(python -c "import socket; print(socket.create_server(('localhost', 0)).getsockname()[1])")
host() {
  LLAMAVID_BUCKETS=$work/disk$1 exec "${run[@]}" --simulate-fault bucket@1 --coordinator $coordinator --processes 2 --process $1
}
host 0 & first=$!
host 1 & second=$!
until [ -s "$work/disk0/gs/${bucket#gs://}/run/metrics.jsonl" ]; do kill -0 $first; sleep 0.1; done
kill -TERM $second
for one in $first $second; do wait $one || echo "ended with $?: 143 is a run that was stopped and goes on"; done

# 3. Started again on one host, the run resumes.  Then draw what its time went into.
"${run[@]}"
mkdir -p build
python -m llamavid_jax.commands.goodput "$bucket/run" build/rehearsal.png
