#!/usr/bin/env bash
# A model's scores on the paper's benchmarks through lmms-eval, as one measurement for `python -m llava.eval.tables`.
#   bash scripts/comp/eval.sh MODEL [TASKS...] [-- LMMS_EVAL_FLAGS...]
#   bash scripts/comp/eval.sh runs/comp_1b_siglip/stage3_sft                        Tab. 1
#   bash scripts/comp/eval.sh runs/vfm_for_lmm/stage3_sft tab2                      Tab. 2
#   TABLE_ROW=tab7/comp_1b_clip bash scripts/comp/eval.sh MODEL chartqa docvqa -- --limit 100
# MODEL is a checkpoint of this project or a LLaVA one. TASKS are tab1, tab2, fig3, ablation, a column (docvqa) or a task of lmms-eval.
set -euo pipefail

# Environment:
#   MODEL_ARGS   more model arguments, e.g. max_num_vistoken=4000,min_num_vistoken=800,strip_period=True (the authors')
#   BATCH_SIZE   prompts at once on each GPU       default: 8
#   NUM_GPUS     GPUs of this machine              default: counted; 0 is the CPU
#   RESULTS      results are written here          default: results/MODEL's path
#   LABEL        name in the tables                default: MODEL
#   TABLE_ROW    rows of the paper's tables that it is to stand beside (llava/eval/paper.yaml)
#   DRY_RUN=1    print the command, run nothing
model=${1:?MODEL is missing: bash scripts/comp/eval.sh MODEL [TASKS...] [-- LMMS_EVAL_FLAGS...]}
typed=(${MODEL_ARGS:+"MODEL_ARGS=$MODEL_ARGS"} bash scripts/comp/eval.sh "$@")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/shell.sh
source scripts/comp/hardware.sh

tasks=()
while (($#)) && [[ $1 != -- ]]; do
  tasks+=("$1")
  shift
done
[[ ${1:-} != -- ]] || shift
((${#tasks[@]})) || tasks=(tab1)

detect_hardware
RESULTS=${RESULTS:-results/${model//[^A-Za-z0-9._-]/_}}
names=$("$PYTHON" -m llava.eval.benchmarks --tasks "${tasks[@]}")
model_args="pretrained=$model${MODEL_ARGS:+,$MODEL_ARGS}"
fresh="$RESULTS/lmms_eval/$(date -u +%Y%m%d-%H%M%S)-$$" # lmms-eval exits 0 even where it failed: what counts is what this run writes
launcher=("$PYTHON" -m accelerate.commands.launch --num_processes "$((NUM_GPUS > 0 ? NUM_GPUS : 1))" --num_machines 1 --mixed_precision no --dynamo_backend no)
((NUM_GPUS > 0)) || launcher+=(--cpu)
((NUM_GPUS < 2)) || launcher+=(--multi_gpu)
command=(
  "${launcher[@]}" -m lmms_eval
  --model llava_comp
  --model_args "$model_args"
  --include_path llava/eval/lmms_tasks
  --tasks "$names"
  --batch_size "${BATCH_SIZE:-8}"
  "$@"
  --output_path "$fresh"
)
((NUM_GPUS > 0)) || command+=(--device cpu)

if dry_run; then
  print_command "${command[@]}"
  exit
fi
"$PYTHON" -c 'import lmms_eval' 2>/dev/null || die "lmms-eval is not installed for $PYTHON: bash scripts/install_lmms_eval.sh"
"${command[@]}"
# shellcheck disable=SC2086 # TABLE_ROW is a list of words
"$PYTHON" -m llava.eval.benchmarks --results "$fresh" --output "$RESULTS/scores.json" --tasks "${tasks[@]}" --model-args "$model_args" \
  --label "${LABEL:-$model}" ${TABLE_ROW:+--row $TABLE_ROW} --command "$(print_command "${typed[@]}")"
say "scores: $RESULTS/scores.json"
