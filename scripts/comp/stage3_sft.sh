#!/usr/bin/env bash
# Stage III: instruction tuning of the whole model at native resolution, on the language loss alone.
# Its values: presets/$PRESET.sh. More flags may follow, the last value of a flag wins: see docs/recipes.md.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_stage stage3_sft "$@"
