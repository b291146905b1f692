#!/usr/bin/env bash
# Stage 3, distillation at 128K from a larger teacher (longer than HyLo trained: see the recipe).
# Submit from the repository's root:  HYLO_ROOT=/shared/hylo sbatch slurm/stage3_ctx128k.sh [--train_tokens N ...]
# or run it on one machine:           HYLO_ROOT=/shared/hylo bash slurm/stage3_ctx128k.sh [...]
#SBATCH --job-name=hylo-stage3_ctx128k
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

slurm_dir="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
[[ -f "$slurm_dir/common.sh" ]] || slurm_dir="$SLURM_SUBMIT_DIR/slurm" # sbatch runs a copy of this file

HYLO_ROOT="${HYLO_ROOT:-$PWD/runs}"                              # where models, data and runs of all stages are
MODEL="${MODEL:-$HYLO_ROOT/stage1_ild/model}"                    # student to start from; the 64K run's model works as well
TEACHER="${TEACHER:-$HYLO_ROOT/models/llama3.1-8b}"              # frozen, by `hylo convert`
DATA="${DATA:-$HYLO_ROOT/data/mix}"                              # dataset of `hylo preprocess`
OUTPUT="${OUTPUT:-$HYLO_ROOT/stage3_ctx128k}"                    # checkpoints, logs and, at the end, model/
RECIPE="${RECIPE:-$slurm_dir/../megatron_hylo/recipes/stage3_ctx128k_llama3.2-1b.yaml}"

# shellcheck source=slurm/common.sh
source "$slurm_dir/common.sh" "$@" # arguments override the recipe's keys
