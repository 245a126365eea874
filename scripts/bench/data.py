"""Data at scale: `python scripts/bench/data.py` makes a mixture of five million records and measures what it costs.

Half of the records are in one JSON list, the others in JSONL. `--records 50000` is a small form. Linux only.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import best_seconds, machine, show
from torch.utils.data import DataLoader, RandomSampler

from comp_patches.image_processor import NativeImageProcessor
from llava.conversation import conv_templates
from llava.data.collator import PackedCollator
from llava.data.dataset import LLaVADataset
from llava.data.mixture import Records, load_records
from llava.data.validate import WordCounter

WORDS = (
    "the",
    "a",
    "of",
    "on",
    "chart",
    "bar",
    "red",
    "blue",
    "left",
    "right",
    "value",
    "shows",
    "year",
    "total",
    "street",
    "person",
    "holds",
    "two",
    "sign",
    "reads",
)
SIZES = ((640, 480), (480, 640), (1024, 768), (500, 375), (336, 336), (800, 600))
NUM_IMAGES = 48
BATCH_SIZE = 4


def make_mixture(folder: Path, num_records: int) -> Path:
    """mix.yaml, its two halves and the images that they share."""
    draw = random.Random(0)
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(NUM_IMAGES):
        photo(SIZES[number % len(SIZES)], generator).save(folder / "images" / f"{number}.jpg", quality=90)
    answers = [" ".join(draw.choices(WORDS, k=draw.randint(20, 90))) for _ in range(1000)]
    with (folder / "half.json").open("w") as array, (folder / "half.jsonl").open("w") as lines:
        array.write("[\n")
        for number in track(range(num_records), "writing records", transient=True):
            text = json.dumps(record(number, answers))
            if number % 2:
                lines.write(text + "\n")
            else:
                array.write((",\n" if number else "") + text)
        array.write("\n]\n")
    (folder / "mix.yaml").write_text(
        "datasets:\n"
        + "".join(f"  - {{json_path: {name}, image_folder: images}}\n" for name in ("half.json", "half.jsonl"))
    )
    return folder / "mix.yaml"


def record(number: int, answers: list[str]) -> dict[str, Any]:
    """One in ten is text alone."""
    turns = [
        {"from": "human", "value": "What is to be seen?" if number % 10 == 9 else "<image>\nWhat is to be seen?"},
        {"from": "gpt", "value": answers[number % 1000]},
    ]
    made = {"id": f"{number:09d}", "image": f"{number % NUM_IMAGES}.jpg", "conversations": turns}
    return made if number % 10 != 9 else {key: made[key] for key in ("id", "conversations")}


def photo(size: tuple[int, int], generator: np.random.Generator) -> Image.Image:
    """Soft shapes with some grain, about as dense a JPEG as a photograph."""
    coarse = generator.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((soft + generator.normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8))


def make_dataset(records: Records) -> LLaVADataset:
    return LLaVADataset(
        records,
        tokenizer=WordCounter(),
        image_processor=NativeImageProcessor(patch_size=14),
        conversation=conv_templates["plain"],
        model_max_length=8192,
    )


def start(mixture: Path) -> dict[str, float]:
    """What every start of a run does with its data, the first one and the later ones alike."""
    started = time.perf_counter()
    records = load_records(mixture)
    loaded = time.perf_counter()
    lengths = make_dataset(records).modality_lengths
    done = time.perf_counter()
    assert len(lengths) == len(records)
    return {"load": loaded - started, "total": done - started, "peak_mb": peak_resident_mb()}


def worker_memory(mixture: Path, num_workers: int, num_samples: int) -> dict[str, list[float]]:
    """Private MB of each worker after `num_samples` random samples, of a bare worker, and of batches on their way."""
    dataset = make_dataset(load_records(mixture))
    bare, _ = _private_mb_of_workers([0] * 64, num_workers, 64, torch.tensor)
    full, on_their_way = _private_mb_of_workers(dataset, num_workers, num_samples, PackedCollator(3 * 14**2))
    return {"bare": bare, "full": full, "on_their_way": on_their_way}


def _private_mb_of_workers(
    dataset: Any, num_workers: int, num_samples: int, collate: Callable
) -> tuple[list[float], list[float]]:
    sampler = RandomSampler(dataset, replacement=True, num_samples=num_samples)
    loader = DataLoader(
        dataset,
        BATCH_SIZE,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    workers = batches._workers
    for _, _ in zip(range(len(loader) - 2 * num_workers), batches, strict=False):
        pass  # stops before the end, where workers leave
    return tuple(zip(*(private_mb(worker.pid) for worker in workers), strict=True))


def private_mb(pid: int) -> tuple[float, float]:
    """USS, what ending the process would free: its own, and that of batches which nobody has fetched yet. They lie in
    memory that is shared as soon as the trainer looks at them."""
    own = handed_over = 0
    in_a_batch = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        first, *fields = line.split()
        if first in ("Private_Clean:", "Private_Dirty:"):
            own, handed_over = (
                (own, handed_over + int(fields[0])) if in_a_batch else (own + int(fields[0]), handed_over)
            )
        elif not first.endswith(":"):  # the head of the next mapping
            in_a_batch = any(field.startswith("/dev/shm/torch_") for field in fields)  # noqa: S108  read, not written
    return own / 1024, handed_over / 1024


def peak_resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) / 1024


def images_per_second(mixture: Path, rounds: int) -> dict[str, float]:
    """Of one core: whole samples, and bare Pillow on the same files to the same sizes."""
    torch.set_num_threads(1)
    records = load_records(mixture)
    dataset = make_dataset(records)
    numbers = [number for number in range(NUM_IMAGES * 2) if "image" in records[number]][:NUM_IMAGES]
    paths = [mixture.parent / "images" / records[number]["image"] for number in numbers]
    grids = [dataset[number]["image_grid_thw"][0].tolist() for number in numbers]
    sizes = [(14 * columns, 14 * rows) for _, rows, columns in grids]

    def bare() -> None:
        for path, size in zip(paths, sizes, strict=True):
            with Image.open(path) as image:
                image.convert("RGB").resize(size, Image.Resampling.BICUBIC)

    def ours() -> None:
        for number in numbers:
            dataset[number]

    seconds = best_seconds({"bare": bare, "ours": ours}, rounds, "images")
    return {name: len(numbers) / value for name, value in seconds.items()}


def in_a_process_of_its_own(function: Callable, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=5_000_000)
    parser.add_argument("--folder", type=Path, help="where to write them for the time being (default: /tmp)")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=3000, help="that the workers make before their memory is read")
    parser.add_argument("--rounds", type=int, default=5, help="of the images' timing, the best is taken")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), options, console)


def measure(folder: Path, options: argparse.Namespace, console: Console) -> None:
    small = make_mixture(folder / "small", max(options.records // 10, 2))
    mixture = make_mixture(folder / "whole", options.records)
    size = sum(file.stat().st_size for file in mixture.parent.glob("half.*")) / 2**30
    first = in_a_process_of_its_own(start, mixture)
    later = in_a_process_of_its_own(start, mixture)
    in_a_process_of_its_own(start, small)
    memory = in_a_process_of_its_own(worker_memory, mixture, options.workers, options.samples)
    memory_of_tenth = in_a_process_of_its_own(worker_memory, small, options.workers, options.samples)
    speed = in_a_process_of_its_own(images_per_second, mixture, options.rounds)
    table = Table("what", "measured", "bar", title=f"{options.records} records, {size:.2f} GiB; {machine()}")
    table.add_row("first start: the cache is made", f"{first['total']:.1f} s", "300 s")
    table.add_row("its peak memory (resident)", f"{first['peak_mb']:.0f} MB", "2048 MB")
    table.add_row("later start: records, path check, lengths", f"{later['total']:.2f} s", "3 s")
    for name, found in (("", memory), (", a tenth of the records", memory_of_tenth)):
        table.add_row(f"private memory of a worker{name}", f"{max(found['full']):.1f} MB", "60 MB")
        table.add_row(f"batches on their way from it{name}", f"{max(found['on_their_way']):.1f} MB", "")
        table.add_row(f"a worker that does nothing{name}", f"{max(found['bare']):.1f} MB", "")
    table.add_row("images/s of one core, whole samples", f"{speed['ours']:.1f}", "")
    table.add_row("images/s of one core, bare Pillow", f"{speed['bare']:.1f}", "")
    table.add_row("ratio", f"{speed['ours'] / speed['bare']:.2f}", "0.85")
    show(table, console)


if __name__ == "__main__":
    main()
