"""What a stage would take on more GPUs, on paper: compute, communication and data, from the planner's counts.

    PRESET=comp_1b_siglip python scripts/bench/scaling.py scripts/comp/stage2_native.sh --gpus 8 64 128

Nothing is measured: rates are flags, with the values that docs/scaling.md argues for. GB are 10⁹ bytes.
"""

import argparse
import json
import math
import subprocess
import sys
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from timing import show

GPUS_OF_A_NODE = 8
BYTES_OF_A_WEIGHT = 2


@dataclass(frozen=True)
class Rates:
    """What is assumed of a GPU and of what joins them.

    Attributes:
        peak_tflops: dense bf16, of a GPU.
        mfu: share of it that the step's counted products reach.
        node_gb, network_gb: GB/s that a GPU sends inside its node, and to other nodes.
        image_mb: of an image's file.
    """

    peak_tflops: float
    mfu: float
    node_gb: float
    network_gb: float
    image_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", help="a stage script of scripts/comp; PRESET, LLM, VISION_TOWER as it takes them")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 128])
    parser.add_argument("--images", type=int, default=256, help="of a step: the recipe's global batch")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="default: H100 SXM, dense bf16")
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--node_gb", type=float, default=300.0)
    parser.add_argument("--network_gb", type=float, default=40.0)
    parser.add_argument("--image_mb", type=float, default=0.2)
    args = parser.parse_args()
    rates = Rates(args.peak_tflops, args.mfu, args.node_gb, args.network_gb, args.image_mb)
    columns = (
        "GPUs",
        "memory GiB",
        "largest GiB",
        "compute s",
        "ZeRO-3 s",
        "ZeRO++ s",
        "ZeRO-2 s",
        "images/s a node",
        "MB/s a node",
    )
    table = Table(*columns, title=f"{args.script}; {rates}")
    for gpus in args.gpus:
        table.add_row(*row(plan(args.script, gpus), gpus, args.images, rates))
    console = Console(width=160)
    show(table, console)


def plan(script: str, gpus: int) -> dict:
    """The planner's counts; its own message where it refuses."""
    command = [sys.executable, "-m", "llava.train.plan", "--gpus", str(gpus), "--json", script]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603  own command
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} ended with exit code {done.returncode}: the lines above say why.")
    return json.loads(done.stdout)[0]


def row(plan: dict, gpus: int, images: int, rates: Rates) -> list[str]:
    parameters = sum(part["total"] for part in plan["parameters"].values())
    static = sum(plan["bytes"]["gpu"].values())
    activations = plan["bytes"]["activations"]
    compute = plan["step_tflops"] / (gpus * rates.peak_tflops * rates.mfu)
    seconds = {name: communication(parameters, gpus, rates, name) for name in ("ZeRO-3", "ZeRO++", "ZeRO-2")}
    images_of_node = images / max(compute, min(seconds.values())) / math.ceil(gpus / GPUS_OF_A_NODE)
    return [
        str(gpus),
        *(f"{(static + activations[batch]) / 2**30:.1f}" for batch in ("typical", "largest")),
        f"{compute:.2f}",
        *(f"{value:.2f}" for value in seconds.values()),
        f"{images_of_node:.0f}",
        f"{images_of_node * rates.image_mb:.0f}",
    ]


def communication(parameters: int, gpus: int, rates: Rates, how: str) -> float:
    """Seconds in which a GPU sends what one micro-batch asks for, if nothing else goes on meanwhile.

    ZeRO-3 gathers the weights forward and backward and scatters the gradients. ZeRO++ gathers int8 weights forward,
    keeps a copy in each node for backward, and scatters int4 gradients between nodes. ZeRO-2 scatters gradients, and
    gathers the updated weights once a step.
    """
    whole = parameters * BYTES_OF_A_WEIGHT / 1e9  # GB
    inside = whole / rates.node_gb
    outside = whole / (rates.network_gb if gpus > GPUS_OF_A_NODE else rates.node_gb)
    return {"ZeRO-3": 3 * outside, "ZeRO++": (1 / 2 + 1 / 4) * outside + inside, "ZeRO-2": 2 * outside}[how]


if __name__ == "__main__":
    main()
