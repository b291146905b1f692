# shellcheck shell=bash
# Sourced by run.sh and result.sh: finds hylo and the device, and has their first steps, up to a calibrated teacher.
# `prepare DOCUMENTS` makes what is not there yet of a set of `hylo fetch`; OUT, LENGTH, CALIBRATION_TOKENS and TEXT are the caller's.
set -euo pipefail

beside="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." >/dev/null && pwd)/.venv/bin" # `make install`
command -v hylo >/dev/null || PATH="$beside:$PATH"
hylo="${HYLO:-hylo}"
if ! command -v "${hylo%% *}" >/dev/null; then
  echo "error: there is no ${hylo%% *} here or in $beside; make install, or HYLO=/path/to/hylo" >&2
  exit 2
fi

# usual KEY GPU CPU: the default of a variable on this machine
device=cpu
if [[ "${CUDA_VISIBLE_DEVICES-all}" != "" ]] && nvidia-smi --list-gpus 2>/dev/null | grep -q '^GPU '; then device=gpu; fi
usual() { [[ -n "${!1:-}" ]] || printf -v "$1" %s "$([[ $device == gpu ]] && echo "$2" || echo "$3")"; }
usual CALIBRATION_TOKENS 262144 16384 # text that the initialisation sees
LINEAR="${LINEAR:-gdn}"              # gdn or mamba2
TEXT="${TEXT:-}"                     # own text (folder or .jsonl) in place of what `hylo fetch` downloads

prepare() {
  mkdir -p "$OUT"
  [[ -d $OUT/teacher ]] || $hylo convert "$($hylo fetch teacher)" "$OUT/teacher"
  [[ -d $OUT/data ]] || $hylo preprocess "${TEXT:-$($hylo fetch "$1")}" "$OUT/data" --tokenizer "$OUT/teacher"
  [[ -d $OUT/calibration ]] || $hylo calibrate "$OUT/teacher" "$OUT/data" "$OUT/calibration" --tokens "$CALIBRATION_TOKENS" \
    --sequence_length "$((LENGTH < 512 ? 512 : LENGTH))"
}
