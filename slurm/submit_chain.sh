#!/usr/bin/env bash
# Submit stages one after the other, each to start once the one before has succeeded (a requeued job has not yet).
#   HYLO_ROOT=/shared/hylo bash slurm/submit_chain.sh stage1_ild stage3_ctx64k
# Each stage's MODEL is stage 1's result by default; options for sbatch go into SBATCH_* variables (man sbatch).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# == 0)); then
    echo "usage: slurm/submit_chain.sh STAGE [STAGE ...], a stage being a script of slurm/ without .sh, e.g. stage1_ild" >&2
    exit 2
fi
previous=""
for stage in "$@"; do
    previous="$(sbatch --parsable ${previous:+--dependency=afterok:"$previous"} "slurm/$stage.sh")"
    previous="${previous%%;*}" # "job;cluster" where there are several clusters
    echo "$stage: job $previous"
done
