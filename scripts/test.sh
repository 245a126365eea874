#!/usr/bin/env bash
# Sets up and tests. Everything but `slow` and `gpu`; --all adds `slow`. Other arguments go to pytest:
#   bash scripts/test.sh tests/scripts -k resume
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/shell.sh
source scripts/setup.sh

marks="not slow and not gpu"
if [[ ${1:-} == --all ]]; then
  marks="not gpu"
  shift
fi
ensure_environment train,serve,playground,dev
if [[ $marks != *"not slow"* ]]; then
  ensure_browser
  bash scripts/install_lmms_eval.sh --light # its end-to-end tests are slow ones
fi
export OMP_NUM_THREADS=1 # One thread in each of the test processes; more would fight for the cores.
exec python -m pytest -n "${TEST_PROCESSES:-2}" -m "$marks" "$@"
