#!/usr/bin/env bash
# Stage 1, Enhanced ILD at 2K: align every mixer of an upcycled hybrid with its layer of the base model.
# Submit from the repository's root:  HYLO_ROOT=/shared/hylo sbatch slurm/stage1_ild.sh [--train_tokens N ...]
# or run it on one machine:           HYLO_ROOT=/shared/hylo bash slurm/stage1_ild.sh [...]
# Two pure models in one pass over the teacher, for `hylo select`: MODEL=(all MLA) and --second_model (all linear).
#SBATCH --job-name=hylo-stage1_ild
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
MODEL="${MODEL:-$HYLO_ROOT/models/llama3.2-1b-4mla12gdn}"        # student to start from: `hylo upcycle` of the teacher
TEACHER="${TEACHER:-$HYLO_ROOT/models/llama3.2-1b}"              # the base model itself, by `hylo convert`
DATA="${DATA:-$HYLO_ROOT/data/mix}"                              # dataset of `hylo preprocess`
OUTPUT="${OUTPUT:-$HYLO_ROOT/stage1_ild}"                        # checkpoints, logs and, at the end, model/
RECIPE="${RECIPE:-$slurm_dir/../megatron_hylo/recipes/stage1_ild_llama3.2-1b.yaml}"

# shellcheck source=slurm/common.sh
source "$slurm_dir/common.sh" "$@" # arguments override the recipe's keys
