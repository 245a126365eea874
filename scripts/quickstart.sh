#!/usr/bin/env bash
# From a fresh clone to a trained model and a report: sets up, trains CoMP's stages on the embedded default, evaluates.
#   bash scripts/quickstart.sh                                on two CPU cores, no GPU: meant to end within 20 minutes
#   PRESET=comp_1b_siglip bash scripts/quickstart.sh          the paper's recipe instead (GPUs, data: docs/data.md)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/shell.sh
source scripts/setup.sh

export PRESET=${PRESET:-embedded}
ensure_environment train,playground
bash scripts/comp/train_all.sh "$@"
