#!/usr/bin/env bash
# lmms-eval into the active environment (or .venv), without what it drags in: torchvision, timm, a CUDA build of torch, wandb.
# Its version is the one that this project's task names and plug-in were tested with.
#   bash scripts/install_lmms_eval.sh            with what the paper's tasks need
#   bash scripts/install_lmms_eval.sh --light    only with what lmms-eval itself imports: enough for the tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/shell.sh

LMMS_EVAL=0.7.3
needs=(-e ".[eval]") # The list of light needs stands in pyproject.toml.
case ${1:-} in
  "") ;;
  --light) needs=(aiohttp datasets evaluate loguru sacrebleu tenacity) ;;
  *) die "$1: expected --light or nothing" ;;
esac

find_python
"$PYTHON" -c 'import torch, transformers' 2>/dev/null || die "$PYTHON has no torch or no transformers: bash scripts/quickstart.sh sets all up; by hand: pip install -e ."
before=$("$PYTHON" -c 'import torch; print(torch.__version__)')
"$PYTHON" -m pip install --quiet --no-deps "lmms-eval==$LMMS_EVAL"
"$PYTHON" -m pip install --quiet -c constraints.txt "${needs[@]}"
after=$("$PYTHON" -c 'import torch; print(torch.__version__)')
[[ $before == "$after" ]] || die "torch was $before and is now $after: some package above asked for it. Install the torch you want again."
"$PYTHON" -c 'import lmms_eval.evaluator' || die "lmms-eval $LMMS_EVAL is there but cannot be imported: the lines above name the package that it misses."
say "lmms-eval $LMMS_EVAL is ready: bash scripts/comp/eval.sh MODEL tab1"
