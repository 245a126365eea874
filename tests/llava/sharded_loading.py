"""Both ranks of a test: a model is loaded in shards that hold the right weights. Arguments: those of a stage."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from llava.model.multimodal_encoder.builder import tower_factory
from llava.model.sharding import full_shape, gathered
from llava.train.arguments import parse_arguments
from llava.train.train import load_model
from llava.train.zero import prepare_zero
from tests.llava.ranks import weights


def main() -> None:
    model_args, data_args, training_args = parse_arguments(sys.argv[1:])
    prepare_zero(training_args)
    expected = weights(Path(model_args.model_name_or_path))
    if model_args.vision_tower:
        expected |= starting_tower(model_args.vision_tower, model_args.tower_options())
        let_the_first_process_alone_read(model_args.vision_tower)
    if model_args.pretrain_mm_mlp_adapter:
        expected |= weights(Path(model_args.pretrain_mm_mlp_adapter).parent)

    model = load_model(model_args, data_args, training_args)
    for name, parameter in model.named_parameters():
        if name not in expected:
            assert "mm_projector" in name, name  # a fresh adapter: small, and whole until training starts
            continue
        assert parameter.shape == (0,), f"{name} is whole on rank {dist.get_rank()}"
        assert full_shape(parameter) == expected[name].shape, name
        with gathered([parameter]):
            assert torch.equal(parameter, expected[name]), name
    dist.barrier()
    dist.destroy_process_group()


def starting_tower(name: str, options: dict) -> dict[str, torch.Tensor]:
    tower = tower_factory(name).build_tower(name, **options)
    return {f"model.vision_tower.{key}": tensor for key, tensor in tower.state_dict().items()}


def let_the_first_process_alone_read(name: str) -> None:
    factory = tower_factory(name)
    build_tower = factory.build_tower

    def build(name, *, config=None, **options):
        assert config is not None or dist.get_rank() == 0, "a second process reads the tower's weights"
        return build_tower(name, config=config, **options)

    factory.build_tower = build


if __name__ == "__main__":
    main()
