#!/usr/bin/env bash
# Stage 3, distillation at 128K from a larger teacher (longer than HyLo trained: see the recipe).
# Submit:                    HYLO_ROOT=/shared/hylo sbatch slurm/stage3_ctx128k.sh [--train_tokens N ...]
# or run it on one machine:  HYLO_ROOT=/shared/hylo bash slurm/stage3_ctx128k.sh [...]
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
stage=stage3_ctx128k

# sbatch runs a copy of this file: Slurm's record of the job, the folder it was submitted from, or HYLO_REPOSITORY says where
# the repository is. These lines are the same in all scripts of stages.
folders=("$(dirname "${BASH_SOURCE[0]}")")
if [[ -n "${HYLO_REPOSITORY:-}" ]]; then
    folders=("${HYLO_REPOSITORY/#\~\//$HOME/}/slurm")
elif [[ -n "${SLURM_JOB_ID:-}" ]]; then
    record="$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null || true)"
    record="${record#*Command=}"
    folders+=("${record%%"/$stage.sh"*}" "${SLURM_SUBMIT_DIR:-$PWD}/slurm" "${SLURM_SUBMIT_DIR:-$PWD}")
fi
for slurm_dir in "${folders[@]}"; do
    [[ ! -f "$slurm_dir/common.sh" ]] || break
done
if [[ ! -f "$slurm_dir/common.sh" ]]; then
    echo "error: the repository is not found in ${folders[*]@Q}: set HYLO_REPOSITORY, e.g. HYLO_REPOSITORY=/home/me/hylo" >&2
    exit 2
fi
slurm_dir="$(cd "$slurm_dir" >/dev/null && pwd)"

HYLO_ROOT="${HYLO_ROOT:-$PWD/runs}"                       # where models, data and runs of all stages are
default_model="$HYLO_ROOT/stage1_ild/model"               # of MODEL, the student; the 64K run's model works as well
default_teacher="$HYLO_ROOT/models/llama3.1-8b"           # of TEACHER, frozen: `hylo convert`
DATA="${DATA:-$HYLO_ROOT/data/mix}"                       # dataset of `hylo preprocess`
OUTPUT="${OUTPUT:-$HYLO_ROOT/$stage}"                     # checkpoints, logs and, at the end, model/
RECIPE="${RECIPE:-$slurm_dir/../megatron_hylo/recipes/stage3_ctx128k_llama3.2-1b.yaml}"

# shellcheck source=slurm/common.sh
source "$slurm_dir/common.sh" "$@" # arguments override the recipe's keys
