# shellcheck shell=bash disable=SC2034,SC2153 # switches, read by paper.sh; ROW is common.sh's
# The towers that Tab. 8 probes: the recipe with the alignment loss and without it.
ROWS="with without"
STAGES=(stage1 stage2_fixed stage2_native) # the towers are those of Stage II
case $ROW in without) ALIGNMENT_STAGES="" ;; esac
source scripts/comp/paper.sh
