#!/usr/bin/env bash
# Held-out accuracy of the embedded run, stage by stage, then its table and report.html.
# train_all.sh calls it at the end; by itself it evaluates what is finished and not yet evaluated.
set -euo pipefail

PRESET=${PRESET:-embedded}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
load_preset
[[ -n ${FIXED_SIZE:-} ]] || die "PRESET=$PRESET sets no FIXED_SIZE, so this evaluation is not for it: PRESET=embedded bash scripts/comp/evaluate_embedded.sh"

main() {
  # Questions: before anything is trained, before and after Stage III, and the controls, which must not read the image.
  untrained_answers ""
  untrained_answers blank --blank
  answers stage2_native ""
  answers stage3_sft ""
  answers stage3_sft blank --blank
  answers stage3_sft random_tower --random-tower

  # Captions: what each stage adds, native resolution above all. Each model sees the images as it was trained to, squashed
  # or as they are. Stage III is not trained to caption; the questions are its.
  captions stage1
  captions stage2_fixed
  captions stage2_native

  run "$PYTHON" -m llava.eval.report --run "$RUN"
}

answers() { # STAGE CONDITION FLAGS...
  evaluate "$1" "qa_$1${2:+_$2}" --model-path "$RUN/$1" --questions "$DATA_ROOT/heldout_qa.json" "${@:3}"
}

untrained_answers() { # CONDITION FLAGS...
  evaluate stage1 "qa_untrained${1:+_$1}" --untrained --model-path "$LLM" --vision-tower "$VISION_TOWER" \
    --max-num-vistoken "$MAX_NUM_VISTOKEN" --questions "$DATA_ROOT/heldout_qa.json" "${@:2}"
}

captions() { # STAGE
  evaluate "$1" "captions_$1" --model-path "$RUN/$1" --captions "$DATA_ROOT/heldout_captions.json"
}

# Once STAGE is finished; not again for a result that is newer than it.
evaluate() { # STAGE RESULT FLAGS...
  local marker="$RUN/$1/finished.json" output="$RUN/evaluation/$2.jsonl"
  if ! dry_run; then
    [[ -f $marker ]] || return 0
    [[ ! -s $output || $marker -nt $output ]] || return 0
    say "evaluating $2"
  fi
  run "$PYTHON" -m llava.eval.held_out --image-folder "$DATA_ROOT" --fixed-size "$FIXED_SIZE" --output "$output" "${@:3}"
}

run() { if dry_run; then print_command "$@"; else "$@"; fi; }

main
