# shellcheck shell=bash disable=SC2034,SC2054 # arrays are read by the scripts; parts are one word, with commas
# LLaVA-OneVision's four stages with its own tower: what their scripts share. Sourced from scripts/train/*.sh, never run.
#
# A script calls `train NAME FLAGS...`; flags of the caller come last and win.
#
# Environment:
#   LLM            default: Qwen/Qwen2-7B-Instruct
#   VISION_TOWER   default: google/siglip-so400m-patch14-384; comp-siglip trains the same stages at native resolution
#   DATA_ROOT      the records name images and videos below it; default: data
#   DATA           records of the stage: .json, .yaml ...; default: the script's
#   OUTPUT_ROOT    a stage writes to OUTPUT_ROOT/NAME; default: runs/onevision
#   START          the checkpoint that the stage goes on from; default: the stage before it
#   NUM_GPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PER_DEVICE_BATCH   as docs/recipes.md has them
#   DRY_RUN=1      print the command, run nothing

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1 # Paths are relative to the repository.

source scripts/shell.sh
source scripts/comp/hardware.sh

LLM=${LLM:-Qwen/Qwen2-7B-Instruct}
VISION_TOWER=${VISION_TOWER:-google/siglip-so400m-patch14-384}
DATA_ROOT=${DATA_ROOT:-data}
OUTPUT_ROOT=${OUTPUT_ROOT:-runs/onevision}
PROJECTOR=(--mm_projector_type mlp2x_gelu)
[[ $VISION_TOWER != comp-* ]] || PROJECTOR=(--mm_projector_type downsample_mlp)

# What every stage after the first one has: the whole model trains, images are cut into up to 9 tiles and unpadded.
WHOLE_MODEL=(
  --version qwen_1_5
  --mm_tunable_parts mm_vision_tower,mm_mlp_adapter,mm_language_model
  --mm_vision_tower_lr 2e-6
  --learning_rate 1e-5
  --group_by_modality_length True
  --image_grid_pinpoints "(1x1),...,(6x6)"
  --mm_patch_merge_type spatial_unpad
  --mm_newline_position grid
  --dataloader_drop_last True
)

# NAME FLAGS...: trains with GLOBAL_BATCH samples a step, BATCH_PER_DEVICE of them on a GPU at once.
train() {
  local name=$1
  shift
  detect_hardware
  split_batch "$name"
  local command=(
    "${LAUNCHER[@]}"
    --output_dir "$OUTPUT_ROOT/$name"
    --run_name "$name"
    --data_path "$DATA"
    --image_folder "$DATA_ROOT"
    --video_folder "$DATA_ROOT"
    --mm_vision_select_layer -2
    --num_train_epochs 1
    --per_device_train_batch_size "$BATCH_PER_DEVICE"
    --gradient_accumulation_steps "$ACCUMULATION"
    --weight_decay 0.
    --warmup_ratio 0.03
    --lr_scheduler_type cosine
    --logging_steps 1
    --save_steps 1000
    --save_total_limit 1
    --dataloader_num_workers 4
    "${HARDWARE_FLAGS[@]}"
    "$@"
  )
  if dry_run; then
    print_command "${command[@]}"
    return
  fi
  [[ -e $DATA ]] || die "$name: data file $DATA is missing. Set DATA; docs/data.md says how records are laid out."
  exec "${command[@]}"
}
