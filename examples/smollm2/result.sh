#!/usr/bin/env bash
# The result: hybrids of SmolLM2-135M at three KV budgets, trained in stages from 2K to 64K tokens, measured after each stage:
#     bash examples/smollm2/result.sh                                  # all parts: prepare select train table
#     bash examples/smollm2/result.sh prepare select                   # some of them
#     MLA_LAYERS=8 STAGES="2k 8k" bash examples/smollm2/result.sh train table   # one budget, the first stages
#
#   prepare   teacher, training text (`hylo fetch library`), text of packages that are in no other set, calibration
#   select    stage 1 of all-MLA and all-linear models, and the layers that matter by KL, recall and both
#   train     OUT/result.yaml, a sweep: each cell is a hybrid, whose stages are trained and measured one after the other
#   table     OUT/sweep/report.md (perplexity, recall and RULER by length, loss by position), exports with model cards
#
# Each part goes on where it was, inside a stage too. Other STAGES, budgets or seeds add to what is there; other
# TOKENS_... or weights train their stages and those after them again. Without a GPU it is one hybrid, of tiny sizes. Time:
# docs/results.md, "Repeat it".
# shellcheck source=examples/smollm2/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

OUT="${OUT:-runs/result$([[ $LINEAR != mamba2 ]] || echo _mamba2)}"
STAGES="${STAGES:-2k 8k 32k 64k}"    # those before another must stay; align, stage 1, may be first: 2.0M tokens changed nothing
BY="${BY:-both}"                     # whose choice of layers is trained: kl, recall or both
SEED="${SEED:-77}"                   # order of the text
usual MLA_LAYERS "4 8 13" 8          # KV budgets: 5.6 %, 11.1 % and 18.1 % of the teacher's cache
usual MORE_CELLS "8:$BY:78 8:even:77" - # more cells, LAYERS:BY:SEED; a second seed and evenly spread layers. - for none
usual LENGTH 2048 256                # tokens a window of the first stages
usual GROWTH "1 4 16 32" "1 2 4 8"   # windows of 2k, 8k, 32k and 64k over LENGTH
usual TOKENS_ALIGN 3000000 2048      # training tokens of stage 1: of the pure models of select, and of align
usual TOKENS_2K 40000000 4096        # and of each later stage: 76,000,000 in all
usual TOKENS_8K 12000000 4096
usual TOKENS_32K 10000000 4096
usual TOKENS_64K 14000000 4096
CE_WEIGHT="${CE_WEIGHT:-1.0}"        # of cross-entropy of all text beside the KL's 1, from 8k on
CROSS_ENTROPY="${CROSS_ENTROPY:-all}" # or answers: facts and questions of exercises have none of it, so that they are not written unasked
usual RECALL 0.2 0.25                # part of a window that is facts and questions, in align, 2k and 8k
ANSWER_WEIGHT="${ANSWER_WEIGHT:-1.0}" # of an answer's cross-entropy there; a token of text's KL is 1
LONG_RECALL="${LONG_RECALL:-0.3}"    # and in 32k and 64k, where the teacher reads overlapping windows of its own length
LONG_ANSWER_WEIGHT="${LONG_ANSWER_WEIGHT:-10.0}"
OPTIMIZER="${OPTIMIZER:-muon}"       # or adamw; stage 1 has adamw
usual MIXER_LR 7e-4 1.25e-4          # peak learning rate of mixers
usual LR 1.5e-4 1e-4                 # of all else
usual SELECT_TOKENS 65536 1024       # text that select measures on
usual ORDERED 13 0                   # MLA layers that select puts in order, at least
usual TRIALS 128 2                   # questions of a recall task and length, windows of perplexity
usual EVAL_LENGTHS "512 1024 2048 4096 8192 16384 32768 65536" "512 1024 2048" # of recall and of loss by position
usual RULER 20 0                     # examples of a RULER task and length: recall in words of no exercise; 0: none
IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --list-gpus 2>/dev/null | grep '^GPU ' | tr '\n' ',' || true)}"
usual AT_ONCE "$((2 * ${#visible[@]}))" 1 # hybrids trained side by side, spread over the GPUs there are: up to 50 GiB each at 64K
usual PRECISION bf16 fp32
usual GRAPHS true false              # CUDA graphs at 2K

base=smollm2-135m-8mla22gdn-teacher recipes="$OUT/recipes/megatron_hylo/recipes"
symbol=$([[ $LINEAR == mamba2 ]] && echo M || echo G)
read -ra times <<<"$GROWTH"
declare -A factor=([align]=1 [2k]=${times[0]} [8k]=${times[1]} [32k]=${times[2]} [64k]=${times[3]})
declare -A tokens=([align]=$TOKENS_ALIGN [2k]=$TOKENS_2K [8k]=$TOKENS_8K [32k]=$TOKENS_32K [64k]=$TOKENS_64K)
declare -A recipe=([align]=stage1_ild [2k]=stage2_ctx8k [8k]=stage2_ctx8k [32k]=stage3_ctx32k [64k]=stage3_ctx64k)
loss="distil: {ce_weight: $CE_WEIGHT}" learnt="cross_entropy: $CROSS_ENTROPY"
long="global_batch_size: 1, $loss, recall: {share: $LONG_RECALL, answer_weight: $LONG_ANSWER_WEIGHT, $learnt}"
windows=$((times[2] / times[1])) # of 8k, as many tokens a step as one of 32k
declare -A more=([align]="stage: align, optimizer: {name: adamw, use_distributed_optimizer: true, lr: 1.0e-3, mixer_lr: null}"
  [2k]="global_batch_size: 8, micro_batch_size: 8, cuda_graphs: $GRAPHS"
  [8k]="global_batch_size: $windows, micro_batch_size: $windows, $loss, recall: {$learnt}" [32k]=$long [64k]=$long)
for name in $STAGES; do
  [[ -n ${factor[$name]:-} ]] || { echo "error: there is no stage $name; choose out of align 2k 8k 32k 64k" >&2; exit 2; }
done

select_layers() {
  local depth name most=$ORDERED pattern running=()
  depth=$(grep -o '"hybrid_layer_pattern": *"[^"]*"' "$OUT/teacher/hylo.json" | head -n 1 | tr -cd '*' | wc -c)
  for name in "all_mla +" "all_linear $symbol"; do
    pattern=$(printf "${name#* }%.0s" $(seq "$depth"))
    [[ -d $OUT/${name% *} ]] || $hylo upcycle "$OUT/teacher" "$OUT/${name% *}" --calibration "$OUT/calibration" --pattern "$pattern"
  done
  [[ -d $OUT/aligned/model ]] || $hylo train --config "$recipes/${recipe[align]}_$base.yaml" --data "$OUT/data" \
    --teacher "$OUT/teacher" --model "$OUT/all_mla" --second_model "$OUT/all_linear" --output "$OUT/aligned" \
    --sequence_length "$LENGTH" --train_tokens "$TOKENS_ALIGN" --precision "$PRECISION"
  for name in $MLA_LAYERS; do most=$((name > most ? name : most)); done
  for name in kl recall both; do
    [[ -d $OUT/select_$name ]] || $hylo select "$OUT/teacher" --mla "$OUT/aligned/model" --linear "$OUT/aligned/second_model" \
      --data "$OUT/data" --count "$most" --method greedy --by "$name" --tokens "$SELECT_TOKENS" --sequence_length "$LENGTH" \
      --output "$OUT/select_$name" &
    if ((AT_ONCE > 1)); then running+=($!); else wait $!; fi
  done
  for name in "${running[@]}"; do wait "$name"; done
}

# cell LAYERS BY SEED
cell() {
  local chosen="{selection: $OUT/select_$2, count: $1}"
  [[ $2 != even ]] || chosen=$1
  echo "  - {label: \"$1 MLA, layers by $2, seed $3\", student.mla: $chosen, train.seed: $3}"
}

specification() {
  local name layers by seed lengths="[${EVAL_LENGTHS// /, }]" divided=true
  [[ $OPTIMIZER != muon ]] || divided=false # its state is whole on every GPU
  cat <<SPEC
# Written by examples/smollm2/result.sh
output: $OUT/sweep
teacher: $OUT/teacher
student: {calibration: $OUT/calibration, linear: $symbol}
train:
  stage: distil
  data: $OUT/data
  eval_data: [$OUT/unseen]
  precision: $PRECISION
  recall: {share: $RECALL, answer_weight: $ANSWER_WEIGHT}
  optimizer: {name: $OPTIMIZER, use_distributed_optimizer: $divided, lr: $LR, mixer_lr: $MIXER_LR}
  eval_windows: $((TRIALS < 16 ? TRIALS : 16))
  checkpoint: {save_interval: 200}
stages:
SPEC
  for name in $STAGES; do
    echo "  $name: {recipe: $recipes/${recipe[$name]}_$base.yaml, sequence_length: $((LENGTH * factor[$name]))," \
      "train_tokens: ${tokens[$name]}, ${more[$name]}}"
  done
  cat <<SPEC
evaluate:                             # at lengths within a model's window
  text: {suites: [ppl, recall], limit: $TRIALS, lengths: $lengths, sequence_length: $LENGTH}
  unseen: {suites: [ppl], data: $OUT/unseen, limit: $TRIALS, lengths: $lengths, sequence_length: $LENGTH}
SPEC
  ((RULER == 0)) || echo "  ruler: {suites: [ruler], limit: $RULER, lengths: [4096, 8192, 16384, 32768]}"
  echo "cells:"
  echo "  - {label: teacher, student: null, stages: null, train.model: $OUT/teacher}"
  for layers in $MLA_LAYERS; do cell "$layers" "$BY" "$SEED"; done
  for name in ${MORE_CELLS/#-/}; do
    IFS=: read -r layers by seed <<<"$name"
    [[ " $MLA_LAYERS " != *" $layers "* ]] || cell "$layers" "$by" "$seed"
  done
  echo "at_once: $AT_ONCE"
}

if [[ $device == cpu ]]; then
  echo "no GPU here: a few thousand tokens a stage, windows of $LENGTH to $((LENGTH * times[3])), fp32" >&2
fi
[[ $# -gt 0 ]] || set -- prepare select train table
for part in "$@"; do
  case "$part" in
    prepare)
      prepare library
      [[ -d $OUT/unseen ]] || $hylo preprocess "${UNSEEN:-$($hylo fetch unseen)}" "$OUT/unseen" --tokenizer "$OUT/teacher" \
        --heldout_fraction 0.3
      [[ -d $OUT/recipes ]] || $hylo scripts "$OUT/recipes" --layout "$base"
      ;;
    select) select_layers ;;
    train)
      specification >"$OUT/result.yaml"
      $hylo sweep "$OUT/result.yaml"
      ;;
    table)
      $hylo sweep report "$OUT/result.yaml"
      sed -n 's/^hylo export //p' "$OUT/sweep/report.md" | while read -r model folder; do
        [[ -d $folder ]] || $hylo export "$model" "$folder" --license apache-2.0 --base_model HuggingFaceTB/SmolLM2-135M-Instruct \
          </dev/null
      done
      cat "$OUT/sweep/report.md"
      ;;
    *) echo "error: there is no part $part; choose out of prepare select train table" >&2; exit 2 ;;
  esac
done
