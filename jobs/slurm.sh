#!/bin/bash
#SBATCH --job-name=train-visualchat-13b-set1-81d040e3
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --cpus-per-task=65
#SBATCH --time=60:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --gpus-per-node=8
# Singleton: typed twice, the second waits for the first and finds its work done.
# What its limit ends waits in the queue again, and goes on from its newest checkpoint.
set -euo pipefail
umask 077

place=/shared/runs/visualchat-13b-set1/jobs/train-visualchat-13b-set1-81d040e3
mkdir -p "$place"
export DSVL_JOB=train-visualchat-13b-set1-81d040e3
export PYTORCH_ALLOC_CONF=expandable_segments:True
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$place/token-$SLURM_JOB_ID"
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$RAY_AUTH_TOKEN_PATH"
cat > "$place/experiment.yaml" <<'EXPERIMENT'
name: visualchat-13b-set1
model:
  size: 13b
  languages:
    7b:
      checkpoint: meta-llama/Llama-2-7b-hf
      vocab_size: 32000
      hidden_size: 4096
      intermediate_size: 11008
      num_hidden_layers: 32
      num_attention_heads: 32
      num_key_value_heads: 32
    13b:
      checkpoint: meta-llama/Llama-2-13b-hf
      vocab_size: 32000
      hidden_size: 5120
      intermediate_size: 13824
      num_hidden_layers: 40
      num_attention_heads: 40
      num_key_value_heads: 40
    70b:
      checkpoint: meta-llama/Llama-2-70b-hf
      vocab_size: 32000
      hidden_size: 8192
      intermediate_size: 28672
      num_hidden_layers: 80
      num_attention_heads: 64
      num_key_value_heads: 8
  vision:
    checkpoint: /shared/qwen_vision
    kind: qwen
    image_size: 448
    patch_size: 14
    hidden_size: 1664
    intermediate_size: 8192
    num_hidden_layers: 48
    queries: 256
    output_size: 4096
data:
  sets:
    llava:
      reader: llava
      annotations:
      - llava/detail_23k.json
      - llava/complex_reasoning_77k.json
      images: coco/train2017
      records: 99883
    llava_dial:
      reader: llava_dial
      annotations:
      - llava/conversation_58k.json
      images: coco/train2017
      records: 56681
    otter_mimicit_cgd:
      reader: otter_mimicit_cgd
      annotations:
      - MIMIC-IT/CGD_instructions.json
      images: coco/train2017
      image_name: '{image}.jpg'
      image_rewrite:
      - ^CGD_IMG_
      - ''
      records: 70941
    otter_mimicit_sd:
      reader: otter_mimicit_sd
      annotations:
      - MIMIC-IT/SD_instructions.json
      images: MIMIC-IT/SD.json
      records: 8007
    otter_mimicit_sn:
      reader: otter_mimicit_sn
      annotations:
      - MIMIC-IT/SN_instructions.json
      images: MIMIC-IT/SN.json
      max_dropped: 0.95
      records: 488
    otter_mimicit_tvc:
      reader: otter_mimicit_tvc
      annotations:
      - MIMIC-IT/TVC_instructions.json
      images: MIMIC-IT/TVC.json
      max_dropped: 1.0
      records: 3
    otter_mimicit_vst:
      reader: otter_mimicit_vst
      annotations:
      - MIMIC-IT/VST_instructions.json
      images: MIMIC-IT/VST.json
      max_dropped: 1.0
      records: 116
  blends:
    llava:
      sets:
      - llava
      concat:
      - 1
      - 3
    llava_dial:
      sets:
      - llava_dial
      concat:
      - 1
      - 2
    otter_mimicit_cgd:
      sets:
      - otter_mimicit_cgd
    llava_otter_blend:
      sets:
      - llava
      - llava_dial
      - otter_mimicit_cgd
      join: true
      records: 48869
train:
  epochs: 6
cluster:
  address: auto
  workers: 16
  cpus_per_worker: 8.0
  gpus_per_worker: 1
  preparers: 16
  gpu_memory_gib: 80.0
  gpu_tflops: 312.0
  gpu_hour_price: 2.0
deploy:
  node_config:
    ImageId: ami-0123456789abcdef0
  machines:
  - head
  - node-1
  - node-2
  secret: dsvl
evaluation:
  batch: 8
  samples: 2000
storage:
  path: /shared/runs
  data: /shared/data
EXPERIMENT

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 --cpus-per-task=65 ray symmetric-run \
  --address "$head:6379" --min-nodes 2 --num-cpus=65 --num-gpus=8 -- python -m jobs.work train "$place/experiment.yaml" &
trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
wait "$!"
