#!/usr/bin/env bash
# The 135M hybrid of run.sh in stages of growing length, 2K -> 8K -> 32K -> 64K, with recall exercises in the text:
#     bash examples/smollm2/long.sh                     # all stages; LINEAR=mamba2 for Mamba2
#     bash examples/smollm2/long.sh 2k 8k               # these alone; each begins with the model of the one before
#     MODEL=runs/smollm2_gdn/distil/model bash examples/smollm2/long.sh 8k 32k   # from the result of run.sh
# Each stage is one `hylo train` with a recipe of `hylo scripts --layout`. The teacher reads 8,192 tokens; up to 32K its positions
# are stretched by YaRN, beyond it reads overlapping windows: the better for recall (benchmarks/results/recall.md, where 4,000,000
# tokens of a stage took about three minutes beside three other runs on one H200).
# Without a GPU the lengths are 256, 512, 1,024 and 2,048 tokens, a few steps each. Every step leaves a finished folder; run
# again, the script goes on where it was, inside a stage too.
# shellcheck source=examples/smollm2/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usual LENGTH 2048 256                # tokens a window of the first stage
usual TOKENS 4000000 8192            # training tokens of each stage
usual EVAL_TOKENS 524288 4096        # held-out text of each evaluation
usual TRIALS 128 2                   # recall questions of a task and length
usual RECALL 0.1 0.25                # part of each window that is facts and questions
usual MIXER_LR 7e-4 1.25e-4          # peak learning rate of mixers
usual LR 1.5e-4 1e-4                 # of all else
usual PRECISION bf16 fp32
MODEL="${MODEL:-$OUT/hybrid}"        # where the first stage begins
names=(2k 8k 32k 64k)
recipes=(stage2_ctx8k stage2_ctx8k stage3_ctx32k stage3_ctx64k) # 2K is stage 2 on shorter windows
times=("1 4 16 32" "1 2 4 8")        # lengths over LENGTH, on a GPU and on a CPU
for name in "$@"; do
  [[ " ${names[*]} " == *" $name "* ]] || { echo "error: there is no stage $name; choose out of ${names[*]}" >&2; exit 2; }
done
read -ra times <<<"$([[ $device == gpu ]] && echo "${times[0]}" || echo "${times[1]}")"
if [[ $device == cpu ]]; then
  echo "no GPU here: $TOKENS tokens a stage, windows of $LENGTH to $((LENGTH * times[3])), fp32 (on a GPU 4,000,000 and 2,048 to" \
    "65,536, bf16)" >&2
fi

prepare
[[ -d $OUT/recipes ]] || $hylo scripts "$OUT/recipes" --layout "$layout"
for i in 0 1 2 3; do
  run="$OUT/long_${names[i]}" length=$((LENGTH * times[i]))
  [[ $# -eq 0 || " $* " == *" ${names[i]} "* ]] || { [[ ! -d $run/model ]] || MODEL="$run/model"; continue; }
  windows=$((LENGTH * times[2] / length)) # as many tokens a step as one window of 32K
  ((windows > 0)) || windows=1
  # several GPUs share each sequence
  [[ -d $run/model ]] || train --config "$OUT/recipes/megatron_hylo/recipes/${recipes[i]}_$layout.yaml" \
    --data "$OUT/data" --teacher "$OUT/teacher" --model "$MODEL" --output "$run" --train_tokens "$TOKENS" \
    --sequence_length "$length" --global_batch_size "$windows" --parallel.context_parallel_size "$NPROC" \
    --recall.share "$RECALL" --optimizer.mixer_lr "$MIXER_LR" --optimizer.lr "$LR" --precision "$PRECISION" \
    --eval_windows "$((EVAL_TOKENS / length + 1))"
  if [[ ! -f $run/evaluation.json ]]; then
    $hylo evaluate "$run/model" "$OUT/data" --teacher "$OUT/teacher" --windows "$((EVAL_TOKENS / length + 1))" \
      --sequence_length "$length" --teacher_window.mode "$( ((i == 3)) && echo windows || echo rope)" >"$run/evaluation.json.partial"
    mv "$run/evaluation.json.partial" "$run/evaluation.json"
  fi
  cat "$run/evaluation.json"
  lengths=512
  for ((n = 1024; n <= length; n *= 2)); do lengths+=",$n"; done
  [[ -d $run/recall ]] || $hylo eval "$run/model" --suite recall --data "$OUT/data" --lengths "[$lengths]" --limit "$TRIALS" \
    --output "$run/recall"
  MODEL="$run/model"
done
results=() # in the stages' order, the first one the baseline
for name in "${names[@]}"; do [[ ! -d $OUT/long_$name/recall ]] || results+=("$OUT/long_$name/recall"); done
((${#results[@]} < 2)) || $hylo compare "${results[@]}" --output "$OUT/recall.html" # stage beside stage
$hylo report "$OUT" # curves, loss by position and recall by distance of all stages, one page
