#!/usr/bin/env bash
# Stage II, first half: the whole model at one high resolution, RoPE-2D and alignment loss on.
# Its values: presets/$PRESET.sh. More flags may follow, the last value of a flag wins: see docs/recipes.md.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
run_stage stage2_fixed "$@"
