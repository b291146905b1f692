#!/usr/bin/env bash
# Submit stages one after the other, each to start once the one before has succeeded (a requeued job has not yet).
#   HYLO_ROOT=/shared/hylo bash slurm/submit_chain.sh stage1_ild stage3_ctx64k
# Each stage's MODEL is stage 1's result by default; options for sbatch go into SBATCH_* variables (man sbatch).
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

slurm_dir="$(cd "$(dirname "${BASH_SOURCE[0]}")" >/dev/null && pwd)"
(($# > 0)) || fail "usage: slurm/submit_chain.sh STAGE [STAGE ...], a stage being a script of slurm/, e.g. stage1_ild"
for stage in "$@"; do # all of them before the first is submitted
    [[ "$stage" == stage* && -f "$slurm_dir/${stage%.sh}.sh" ]] ||
        fail "there is no stage $stage; choose out of $(cd "$slurm_dir" && echo stage*.sh)"
done
for name in MODEL OUTPUT RECIPE; do
    [[ -z "${!name:-}" || $# -eq 1 ]] ||
        fail "$name=${!name} would be that of all $# stages; submit them one by one, or set HYLO_ROOT"
done
command -v sbatch >/dev/null || fail "there is no sbatch here; submit from a login node of the cluster"
export HYLO_REPOSITORY="${HYLO_REPOSITORY:-$(dirname "$slurm_dir")}"

previous=""
for stage in "$@"; do
    # --kill-on-invalid-dep: should a stage fail, those behind it do not wait for ever.
    previous="$(sbatch --parsable --kill-on-invalid-dep=yes ${previous:+--dependency=afterok:"$previous"} \
        "$slurm_dir/${stage%.sh}.sh")"
    previous="${previous%%;*}" # "job;cluster" where there are several clusters
    echo "${stage%.sh}: job $previous"
done
