"""Command lines of LLaVA's own scripts, flag by flag, with values of ours: the trainer understands each."""

import pytest

from llava.train.arguments import parse_arguments

ALL = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
# What each of the three says about the run itself.
COMMON = (
    "--data_path d.json --image_folder images --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 "
    "--mm_use_im_start_end False --mm_use_im_patch_token False --bf16 False --output_dir out --num_train_epochs 1 "
    "--per_device_train_batch_size 2 --per_device_eval_batch_size 3 --gradient_accumulation_steps 2 "
    "--evaluation_strategy no --save_strategy steps --save_steps 50 --save_total_limit 1 --weight_decay 0. "
    "--warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --tf32 False --gradient_checkpointing True "
    "--dataloader_num_workers 2 --lazy_preprocess True --report_to none --use_cpu"
)
PRETRAIN = (
    "--model_name_or_path llm --version plain --vision_tower openai/clip-vit-large-patch14-336 "
    "--mm_tunable_parts=mm_mlp_adapter --learning_rate 1e-3 --model_max_length 512 --run_name first "
    "--attn_implementation sdpa"
)
FINETUNE_V15 = (
    "--model_name_or_path vicuna --version v1 --vision_tower openai/clip-vit-large-patch14-336 "
    "--pretrain_mm_mlp_adapter first/mm_projector.bin --image_aspect_ratio pad --group_by_modality_length True "
    "--learning_rate 2e-5 --model_max_length 2048"
)
FINETUNE_ONEVISION = (
    "--model_name_or_path before --version qwen_1_5 --video_folder videos --vision_tower "
    f"google/siglip-so400m-patch14-384 --mm_tunable_parts={ALL} --mm_vision_tower_lr=2e-6 "
    "--group_by_modality_length True --image_aspect_ratio anyres_max_9 --image_grid_pinpoints (1x1),...,(6x6) "
    "--mm_patch_merge_type spatial_unpad --mm_newline_position grid --add_time_instruction False --force_sample True "
    "--mm_spatial_pool_stride 2 --learning_rate 1e-5 --model_max_length 32768 --run_name third "
    "--dataloader_drop_last True --frames_upbound 32"
)
EXPECTED = {
    PRETRAIN: {"mm_tunable_parts": "mm_mlp_adapter", "version": "plain", "attn_implementation": "sdpa"},
    FINETUNE_V15: {"image_aspect_ratio": "pad", "pretrain_mm_mlp_adapter": "first/mm_projector.bin", "version": "v1"},
    FINETUNE_ONEVISION: {"video_frames": 32, "force_sample": True, "mm_vision_tower_lr": 2e-6, "mm_tunable_parts": ALL},
}


@pytest.mark.parametrize("flags", EXPECTED, ids=["pretrain", "finetune_v15", "finetune_onevision"])
def test_a_command_line_of_llavas_is_understood(flags):
    groups = parse_arguments([*COMMON.split(), *flags.split()])
    for name, value in (EXPECTED[flags] | {"mm_vision_select_layer": -2, "save_steps": 50}).items():
        (found,) = [getattr(group, name) for group in groups if hasattr(group, name)]
        assert found == value, name
    assert groups[2].eval_strategy == "no"
