#!/usr/bin/env bash
# From a fresh clone to a trained model and a report: sets up, trains CoMP's stages on the embedded default, evaluates.
#   bash scripts/quickstart.sh                                on two CPU cores, no GPU: meant to end within 20 minutes
#   PRESET=comp_1b_siglip bash scripts/quickstart.sh          the paper's recipe instead (GPUs, data: docs/data.md)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/shell.sh
source scripts/setup.sh

# How the user's own shell, with or without an environment, asks the trained model a held-out question.
print_chat() { # HAD_ENVIRONMENT
  local run="${OUTPUT_ROOT:-runs}/$PRESET" data asked image question
  data=${DATA_ROOT:-$run/data}
  asked=$(python -c '
import json, sys
record = json.load(open(sys.argv[1], encoding="utf-8"))[0]
print(record["image"], record["conversations"][0]["value"].splitlines()[-1], sep="\n")' "$data/heldout_qa.json")
  image=${asked%%$'\n'*} question=${asked#*$'\n'}
  printf '\nAsk the model:\n'
  [[ -n $1 ]] || printf 'source .venv/bin/activate\n'
  printf '%s --prompt "%s"\n' \
    "$(print_command python -m llava.serve.cli --model-path "$run/stage3_sft" --image-file "$data/$image")" "$question"
}

had_environment=${VIRTUAL_ENV:-}${CONDA_PREFIX:-}
export PRESET=${PRESET:-embedded}
ensure_environment train,playground
bash scripts/comp/train_all.sh "$@"
if [[ $PRESET == embedded ]] && ! dry_run; then print_chat "$had_environment"; fi
