#!/usr/bin/env bash
# Submit stages one after the other, each to start once the one before has succeeded (a requeued job has not yet).
#   HYLO_ROOT=/shared/hylo MODEL=/shared/hylo/models/hybrid bash slurm/submit_chain.sh stage1_ild stage3_ctx64k
# Each stage begins with the model of the one before. MODEL is that of the first. TEACHER, OUTPUT, DATA and RECIPE hold for
# all stages, or for one with its number: TEACHER_2 is the second stage's (MODEL_2 and so on as well). All paths are checked
# before the first job is submitted. Options for sbatch go into SBATCH_* variables (man sbatch).
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

slurm_dir="$(cd "$(dirname "${BASH_SOURCE[0]}")" >/dev/null && pwd)"
(($# > 0)) || fail "usage: slurm/submit_chain.sh STAGE [STAGE ...], a stage being a script of slurm/, e.g. stage1_ild"
for stage in "$@"; do
    [[ "$stage" == stage* && -f "$slurm_dir/${stage%.sh}.sh" ]] ||
        fail "there is no stage $stage; choose out of $(cd "$slurm_dir" && echo stage*.sh)"
done
for name in OUTPUT RECIPE; do
    [[ -z "${!name:-}" || $# -eq 1 ]] ||
        fail "$name=${!name} would be that of all $# stages; set ${name}_1 to ${name}_$#, or HYLO_ROOT"
done
for name in MODEL TEACHER DATA OUTPUT RECIPE; do
    numbered="${name}_$(($# + 1))"
    [[ -z "${!numbered:-}" ]] || fail "$numbered=${!numbered} is of no stage: there are $#"
done
# shellcheck source=slurm/site.sh
source "$slurm_dir/site.sh"
for name in MODULES HYLO_PYTHON CONTAINER_IMAGE CONTAINER_MOUNTS NETWORK_INTERFACE NODE_CHECK SBATCH_{ACCOUNT,PARTITION,QOS}; do
    [[ -z "${!name}" ]] || export "${name?}" # an empty SBATCH_* would be a wrong one
    [[ "$name" != SBATCH_* || -n "${!name}" ]] || unset "$name"
done
command -v sbatch >/dev/null || fail "there is no sbatch here; submit from a login node of the cluster"
export HYLO_REPOSITORY="${HYLO_REPOSITORY:-$(dirname "$slurm_dir")}"

# What a stage is started with, as NAME=VALUE words; MODEL of a later stage is the result of the one before.
number=0 before="" outputs=""
declare -a settings=()
for stage in "$@"; do
    number=$((number + 1))
    words=()
    for name in MODEL TEACHER DATA OUTPUT RECIPE; do
        numbered="${name}_$number"
        value="${!numbered:-}"
        [[ -n "$value" || ("$name" == MODEL && $number -gt 1) ]] || value="${!name:-}"
        [[ -n "$value" || "$name" != MODEL ]] || value="${before:+$before/model}"
        words+=("$name=$value")
    done
    # The script itself checks its paths; the model of the stage before is not there yet.
    checked="$(env "${words[@]}" HYLO_CHECK_ONLY="${before:-none}" SLURM_JOB_ID= bash "$slurm_dir/${stage%.sh}.sh")" ||
        fail "stage $number, $stage, would not start (above); nothing was submitted"
    before="${checked##*$'\n'}"
    [[ "$outputs" != *":$before:"* ]] || fail "two stages write OUTPUT=$before; set OUTPUT_$number"
    outputs+=":$before:"
    settings+=("$(printf '%q ' "${words[@]}")")
done

previous="" number=0
for stage in "$@"; do
    # --kill-on-invalid-dep: should a stage fail, those behind it do not wait for ever.
    eval "words=(${settings[number]})"
    number=$((number + 1))
    dependency="${previous:+afterok:$previous}"
    [[ -z "$SINGLETON" ]] || dependency+="${dependency:+,}singleton"
    previous="$(env "${words[@]}" sbatch --parsable --kill-on-invalid-dep=yes \
        ${dependency:+--dependency="$dependency"} "$slurm_dir/${stage%.sh}.sh")"
    previous="${previous%%;*}" # "job;cluster" where there are several clusters
    echo "${stage%.sh}: job $previous"
done
