"""The held-out questions of the embedded data as a task of lmms-eval: a Parquet file and its YAML, all local.

    python -m playground.lmms_task --data runs/embedded/data --output runs/embedded/lmms_task [--limit 100]

Scored by lmms-eval's own `exact_match`, so that the score can be compared with `python -m llava.eval.held_out`.
"""

import argparse
import json
from pathlib import Path

TASK = "playground_qa"
YAML = """\
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
task: {task}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 24
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
metadata:
  - version: 0.0
"""
UTILS = '''\
"""Read by lmms-eval through the YAML file beside it."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]
'''


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m playground.lmms_task", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="what python -m playground.make_data wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    args = parser.parse_args(argv)
    records = json.loads((args.data / "heldout_qa.json").read_text(encoding="utf-8"))
    write_task(records[: args.limit], args.data, args.output)


def write_task(records: list[dict], image_folder: Path, output: Path) -> None:
    """`test.parquet`, `TASK.yaml`, `utils.py`: a folder for lmms-eval's --include_path."""
    from datasets import Dataset, Features, Image, Value

    rows = [
        {
            "image": {"bytes": (image_folder / record["image"]).read_bytes(), "path": None},
            "question": record["conversations"][0]["value"].replace("<image>", "").strip(),
            "answer": record["conversations"][1]["value"],
        }
        for record in records
    ]
    output.mkdir(parents=True, exist_ok=True)
    parquet = (output / "test.parquet").resolve()
    features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(parquet)
    (output / f"{TASK}.yaml").write_text(YAML.format(parquet=parquet, task=TASK), encoding="utf-8")
    (output / "utils.py").write_text(UTILS, encoding="utf-8")


if __name__ == "__main__":
    main()
