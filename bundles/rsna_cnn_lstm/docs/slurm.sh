#!/bin/bash
# Training on several nodes of a SLURM cluster: sbatch docs/slurm.sh, in this bundle's folder, which all nodes see, as
# they see dataset_dir and output_root. What follows the script's name goes on as overrides (--batch_size 8).
# Submitted again under the same RUN_NAME, with as many nodes as there are then, it goes on with the run.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
set -euo pipefail

data=${DATASET_DIR:-/workspace/data/rsna-2023-abdominal-trauma-detection}
output=${OUTPUT_ROOT:-/workspace/output}
name=${RUN_NAME:-several_nodes}
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
resume=()
if [[ -e "$output/$name/run.json" ]]; then
    resume=(--resume latest)
fi

# one torchrun a node; it starts a process a GPU. A node that fails ends the job on the others
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$first_node:${PORT:-29500}" \
    -m monai.bundle run --config_file "['configs/train.json','configs/multi_gpu_train.json']" \
    --dataset_dir "$data" --output_root "$output" --run_name "$name" "${resume[@]}" "$@"
