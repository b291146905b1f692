# shellcheck shell=bash
# Sourced by common.sh: OUTPUT/submit.slurm, with which `sbatch OUTPUT/submit.slurm` resumes the run, or repeats it with another
# OUTPUT=..., and OUTPUT/recipe.yaml, the recipe as it was at the run's first start.
# shellcheck disable=SC2154  # variables of common.sh

# An #SBATCH line of the option $1 with the value $2, where it has one.
option() { [[ -z "$2" || "$2" == "(null)" || "$2" == N/A ]] || echo "#SBATCH --$1=$2"; }

# Value of the field $1 in Slurm's record of the job.
field() { sed -n "s/.*\\b$1=\\([^ ]*\\).*/\\1/p" <<<"$about" | head -n 1; }

# Print the script; the arguments are those of the stage script.
submit_script() {
    local about="" line name gpus
    echo "#!/usr/bin/env bash"
    echo "# Resumes the run in $OUTPUT: sbatch submit.slurm. Repeats it: OUTPUT=/elsewhere sbatch submit.slurm"
    [[ -z "$job" ]] || about="$(scontrol show job "$job" 2>/dev/null || true)"
    if [[ -n "$about" ]]; then
        option partition "$(field Partition)"
        option account "$(field Account)"
        option qos "$(field QOS)"
        option nodes "${nodes:-}"
        option time "$(field TimeLimit)"
        gpus="$(field TresPerNode)"
        option gpus-per-node "${gpus##*gpu:}"
    fi
    while IFS= read -r line; do # what the job did not decide is as in the stage's own script
        [[ "$line" == "#SBATCH"* ]] || continue
        name="${line#*--}"
        name="${name%%=*}"
        [[ -n "$about" && "$name" =~ ^(nodes|time|gpus-per-node|partition|account|qos)$ ]] || echo "$line"
    done <"$slurm_dir/$stage.sh"
    for name in HYLO_ROOT DATA MODEL TEACHER OUTPUT HYLO_PYTHON CONTAINER_IMAGE CONTAINER_MOUNTS NETWORK_INTERFACE MODULES \
        NODE_CHECK NPROC_PER_NODE; do
        # shellcheck disable=SC2016
        [[ -z "${!name:-}" ]] || printf '[[ -n "${%s:-}" ]] || export %s=%q\n' "$name" "$name" "${!name}"
    done
    printf 'export RECIPE=%q HYLO_REPOSITORY=%q\n' "$OUTPUT/recipe.yaml" "$repository"
    printf 'exec bash %q' "$slurm_dir/$stage.sh"
    (($# == 0)) || printf ' %q' "$@"
    echo ' "$@"'
}

if [[ "$RECIPE" != "$OUTPUT/recipe.yaml" ]]; then
    cp -f "$RECIPE" "$OUTPUT/recipe.yaml"
    submit_script "$@" >"$OUTPUT/.submit.slurm.partial" && mv -f "$OUTPUT/.submit.slurm.partial" "$OUTPUT/submit.slurm"
fi
