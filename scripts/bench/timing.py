"""Times and peak memory of several ways to do one thing, comparable because they are taken in turns in one run."""

import argparse
import multiprocessing
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

Run = Callable[[], None]
TABLES_FILE = "BENCH_TABLES"  # environment variable: a file to which tables are added as Markdown


def machine() -> str:
    """What ran: torch's version, the GPU or the CPU by name, and the threads."""
    return f"torch {torch.__version__}, {_processor()}, {torch.get_num_threads()} threads"


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, and `--threads`, which every comparison has and which is set here."""
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def show(table: Table, console: Console) -> None:
    """Print a table, and add it to the file that TABLES_FILE names, if it does."""
    console.print(table)
    if file := os.environ.get(TABLES_FILE):
        with open(file, "a") as markdown:
            markdown.write(as_markdown(table))


def as_markdown(table: Table) -> str:
    """The same cells; the title above them."""
    columns = [[str(cell) for cell in (column.header, *column.cells)] for column in table.columns]
    head, *body = (" | ".join(cells) for cells in zip(*columns, strict=True))
    title = f"{table.title}\n\n" if table.title else ""
    return title + "\n".join((f"| {head} |", "|---" * len(columns) + "|", *(f"| {line} |" for line in body))) + "\n\n"


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # Linux's platform.processor() is empty
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


def best_seconds(runs: dict[str, Run], rounds: int, title: str) -> dict[str, float]:
    """Least wall time of each over `rounds` rounds of all, after one round that is not counted."""
    best = dict.fromkeys(runs, float("inf"))
    turns = [(turn, name) for turn in range(rounds + 1) for name in runs]
    for turn, name in track(turns, description=title, transient=True):
        seconds = _seconds(runs[name])
        if turn:
            best[name] = min(best[name], seconds)
    return best


def _seconds(run: Run) -> float:
    """Least wall time; a short run is repeated until a second has passed, or its chance would show."""
    least, total = float("inf"), 0.0
    while total < 1:
        _synchronise()
        start = time.perf_counter()
        run()
        _synchronise()
        least = min(least, time.perf_counter() - start)
        total += time.perf_counter() - start
    return least


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_megabytes(make_run: Callable[..., Run], *args) -> float:
    """What one run adds to the peak memory of a fresh process that holds model and inputs already."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (make_run, args))


def _peak_here(make_run: Callable[..., Run], args: tuple) -> float:
    run = make_run(*args)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far, which began as the parent's
    before = _peak_resident_kib()
    run()
    return (_peak_resident_kib() - before) / 2**10


def _peak_resident_kib() -> int:
    """Linux's count of this process; getrusage's cannot be reset."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
