# shellcheck shell=bash
# Sourced by common.sh: makes `program`, the words of `hylo train`, out of DATA, OUTPUT, RECIPE, default_model and default_teacher
# of a stage script and the caller's MODEL and TEACHER, all checked. Arguments are those of the stage script.
# No default teacher is given to a run that learns from --teacher_store or --teacher_address, or pretrains; no default model
# to one with --scratch. Each task of a job array has an OUTPUT of its own, which ends in the task's number.

# Value of the setting $1: the last --$1 in the other arguments, else the recipe's; nothing where it is null or not given.
setting() {
    local name="$1" value previous="" argument
    shift
    value="$(sed -n "s/^$name: *\([^#[:space:]]*\).*/\1/p" "$RECIPE")"
    value="${value//[\"\']/}"
    for argument in "$@"; do
        [[ "$argument" != "--$name="* ]] || value="${argument#*=}"
        [[ "$previous" != "--$name" ]] || value="$argument"
        previous="$argument"
    done
    [[ "$value" == null ]] || printf '%s\n' "$value"
}

# The file $3 in the folder $2 that the variable $1 names; $4 is a verb that makes such folders. While a chain is checked,
# the result of the run HYLO_CHECK_ONLY is taken to be there: the stage before will write it.
check_folder() {
    [[ -z "${HYLO_CHECK_ONLY:-}" || "$2" != "$HYLO_CHECK_ONLY/model" ]] || return 0
    [[ -f "$2/$3" ]] || fail "there is no $2/$3: set HYLO_ROOT, or $1 to a folder made by hylo $4, e.g. $1=/shared/hylo/$5"
}

for argument in "$@"; do
    case "${argument%%=*}" in
        --model | --teacher | --data | --output)
            name="${argument%%=*}"
            name="${name#--}"
            fail "$argument: give this script the variable ${name^^}, e.g. ${name^^}=/shared/hylo/$name sbatch ..."
            ;;
    esac
done
DATA="$(absolute DATA "$DATA")"
OUTPUT="$(absolute OUTPUT "$OUTPUT")"
RECIPE="$(absolute RECIPE "$RECIPE")"
[[ -f "$RECIPE" ]] || fail "RECIPE=$RECIPE is not a file; e.g. RECIPE=/shared/hylo/mine.yaml"
elsewhere="$(setting teacher_store "$@")$(setting teacher_address "$@")"
[[ -n "$elsewhere" || "$(setting stage "$@")" == pretrain ]] || TEACHER="${TEACHER:-$default_teacher}"
[[ -n "$(setting scratch "$@")" ]] || MODEL="${MODEL:-$default_model}"
[[ -z "${SLURM_ARRAY_TASK_ID:-}" ]] || OUTPUT="${OUTPUT}_$SLURM_ARRAY_TASK_ID" # else the tasks would write one run

program=(train --config "$RECIPE" --data "$DATA" --output "$OUTPUT")
check_folder DATA "$DATA" data.json preprocess data/mix
if [[ -n "${MODEL:-}" ]]; then
    MODEL="$(absolute MODEL "$MODEL")"
    check_folder MODEL "$MODEL" hylo.json "convert or upcycle" models/student
    program+=(--model "$MODEL")
fi
if [[ -n "${TEACHER:-}" ]]; then
    TEACHER="$(absolute TEACHER "$TEACHER")"
    check_folder TEACHER "$TEACHER" hylo.json convert models/llama3.1-8b
    program+=(--teacher "$TEACHER")
fi
