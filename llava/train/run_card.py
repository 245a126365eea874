"""`run_card.json` and `run_card.md` beside a run: what it was made with, start by start.

A run that is continued adds a start and keeps the earlier ones, so the card tells where code, packages, arguments or
data changed in between.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from llava.code_state import code_state
from llava.data.mixture import Records
from llava.utils import write_text

FILE = "run_card.json"
PAGE = "run_card.md"
PACKAGES = (
    *("torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "tokenizers", "safetensors", "numpy"),
    *("pillow", "flash-attn", "liger-kernel", "bitsandbytes"),
)
COMPARED = ("code", "versions", "hardware", "arguments", "data")
# Beside the data themselves and the global batch: what decides which samples a step has, and in what order.
ORDERING = (
    *("seed", "data_seed", "model_max_length", "group_by_modality_length", "pack_to_max_length"),
    "dataloader_drop_last",
)


def add_start(
    folder: str | Path,
    *,
    step: int,
    arguments: dict[str, dict],
    data_path: str | Path,
    records: Records,
    world_size: int,
) -> None:
    """Append this start to the folder's card, and render the page. One process of a run does.

    Args:
        step: optimizer steps that were done before it.
        arguments: every value in force, by group.
    """
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "code": code_state(Path(__file__).parent),
        "versions": package_versions(),
        "hardware": hardware(world_size),
        "arguments": arguments,
        "data": {"data_path": str(data_path), "records": len(records), "sources": records.manifest()},
    }
    starts = [*read_starts(folder), json.loads(json.dumps(start, default=str))]  # all as a file has it
    write_text(Path(folder) / FILE, json.dumps({"starts": starts}, indent=1, ensure_ascii=False) + "\n")
    write_text(Path(folder) / PAGE, page(starts))


def read_starts(folder: str | Path) -> list[dict[str, Any]]:
    """The starts so far, oldest first; none without a card. A file that is no card is never written over."""
    file = Path(folder) / FILE
    if not file.exists():
        return []
    try:
        starts = json.loads(file.read_text(encoding="utf-8"))["starts"]
        if not isinstance(starts, list):
            raise TypeError("`starts` is no list")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no run card ({error}). Move it away; this start makes a new one.") from error
    return starts


def check_same_data(folder: str | Path, records: Records, training: dict[str, Any], world_size: int) -> None:
    """Refuse to continue the folder's run on other data than it had at its last start, or on the same ones in another
    order. Where they lie does not count.

    Args:
        training: the arguments in force, as `add_start` has them.

    Raises:
        ValueError: What changed, in one line.
    """
    starts = read_starts(folder)
    if not starts:
        return
    last, new = starts[-1], records.manifest()
    changed = [text for pair in zip_longest(last["data"]["sources"], new) for text in _changes_of_source(*pair)]
    before = _ordering(last["arguments"]["training"], last["hardware"]["world_size"])
    now = _ordering(training, world_size)
    changed += [f"{name} {before[name]} is {now[name]} now" for name in now if before[name] != now[name]]
    if changed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ValueError(
            f"--data_path: the data, or their order, are not those that {folder} was trained on so far: "
            f"{changed[0]}{more}. What the run has seen and what is left would not be known. Take what it had, another "
            "--output_dir, or --allow_changed_data True."
        )


def _ordering(training: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Flag -> its value, and the samples of a step."""
    values = {f"--{name}": training.get(name) for name in ORDERING}
    if values["--data_seed"] in (None, "None"):  # as transformers writes it: unset, and then --seed's
        values["--data_seed"] = values["--seed"]
    a_process = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    return values | {"the global batch": a_process * world_size}


def _changes_of_source(old: dict[str, Any] | None, new: dict[str, Any] | None) -> Iterator[str]:
    if old is None or new is None:
        yield f"{(old or new)['source']} is {'new' if old is None else 'gone'}"
        return
    for count in ("records", "drawn"):
        if old[count] != new[count]:
            yield f"{new['source']}: {old[count]} {count} are {new[count]} now"
    if old["drawn"] == new["drawn"] and old.get("drawn_crc32", new["drawn_crc32"]) != new["drawn_crc32"]:
        yield f"{new['source']}: other {new['drawn']} records are drawn"
    for before, now in zip_longest(old["files"], new["files"]):
        if before is None or now is None:
            yield f"{(before or now)['file']} is {'new' if before is None else 'gone'}"
        elif before["sha256"] != now["sha256"]:
            yield f"{now['file']} has another content"


def package_versions() -> dict[str, str | None]:
    """Python's and the packages' versions; null for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def hardware(world_size: int) -> dict[str, Any]:
    """How many processes train, and on what this one does."""
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})"
    return {"world_size": world_size, "device": device, "cuda": torch.version.cuda if on_gpu else None}


def page(starts: list[dict[str, Any]]) -> str:
    """The card to read: the last start, and of each what changed since the one before."""
    last = starts[-1]
    lines = ["# Run card", "", "| start | step | commit | changed since the start before |", "|---|---|---|---|"]
    for before, start in zip([None, *starts], starts, strict=False):
        changed = "" if before is None else "; ".join(changes(before, start)) or "nothing"
        lines.append(f"| {start['time']} | {start['step']} | {_commit(start['code'])} | {_cell(changed)} |")
    lines += ["", "## Data", "", "| source | records | drawn an epoch | files | bytes |", "|---|---|---|---|---|"]
    for source in last["data"]["sources"]:
        size = sum(file["bytes"] for file in source["files"])
        name = _cell(source["source"])
        lines.append(f"| {name} | {source['records']:,} | {source['drawn']:,} | {len(source['files'])} | {size:,} |")
    lines += ["", "## Packages and hardware", ""]
    facts = {name: value for name, value in (last["versions"] | last["hardware"]).items() if value is not None}
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", f"Every argument, and every file's SHA-256: `{FILE}`."]
    return "\n".join(lines) + "\n"


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two starts, one phrase for each value."""
    old, new = ({field: start[field] for field in COMPARED} for start in (before, after))
    return _differences("", old, new)


def _differences(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [text for key in keys for text in _differences(f"{name}.{key}".lstrip("."), old.get(key), new.get(key))]
    if old == new:
        return []
    if isinstance(old, list) or isinstance(new, list):
        return [name]
    return [f"{name} {_short(old)} → {_short(new)}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


def _commit(code: dict[str, str | None]) -> str:
    if code["commit"] is None:
        return "no git"
    return code["commit"][:10] + (" with uncommitted changes" if code["changes_sha256"] else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
