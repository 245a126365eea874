"""Every comparison that docs/performance.md quotes, one after another, each in a process of its own.

    python scripts/bench/all.py --output bench.md              # about three hours on two cores
    python scripts/bench/all.py --only tower data              # some of them
    python scripts/bench/all.py --small                        # tiny sizes: that everything runs, no figures to quote

Prints the tables, and writes them as Markdown with machine, versions, commit and commands. Figures to quote need a
machine that does nothing else.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from timing import TABLES_FILE, machine

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Bench:
    """A script with its flags, and those of its smallest form."""

    script: str
    flags: str = ""
    small: str = ""


ONE_LAYER = "--layers 1 --images 2 --rounds 1"
BENCHES = {
    "tower": Bench("tower.py", small=f"--vit width384 --parts forward --encoders floor ours {ONE_LAYER}"),
    "alignment_loss": Bench("alignment_loss.py", small="--samples 4 --words 500 --width 32 --rounds 1"),
    "alignment_step": Bench("alignment_step.py", small="--steps 1 --rounds 1"),
    "train_step": Bench("train_step.py", small=f"--parts loss --tokens 100 --words 500 {ONE_LAYER}"),
    "sampler": Bench("sampler.py", small="--samples 200"),
    "data": Bench("data.py", small="--records 200 --samples 8 --workers 1 --rounds 1"),
    "serving": Bench("serving.py", small="--small --rounds 1 --tokens 8 --requests 24 --clients 6"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES), metavar="NAME")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    sections = [run(BENCHES[name], args.small) for name in args.only]
    if args.output:
        partial = args.output.with_suffix(".partial")
        partial.write_text("\n".join((head(), *sections)))
        partial.rename(args.output)
        print(args.output)


def run(bench: Bench, small: bool) -> str:
    """Run one, which prints as it goes; returns its command and its tables in Markdown."""
    flags = shlex.split(bench.small if small else bench.flags)
    with tempfile.TemporaryDirectory() as folder:
        tables = Path(folder) / "tables.md"
        tables.touch()
        command = [sys.executable, str(HERE / bench.script), *flags]
        done = subprocess.run(command, env=os.environ | {TABLES_FILE: str(tables)}, check=False)  # noqa: S603  own command
        if done.returncode:
            sys.exit(f"error: {bench.script} ended with exit code {done.returncode}: the lines above say why.")
        return f"## `{shlex.join(['python', f'scripts/bench/{bench.script}', *flags])}`\n\n{tables.read_text()}"


def head() -> str:
    """When, of what, and on which machine."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True, check=False)  # noqa: S603  own command
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "numpy", "pillow"))
    measured = (
        f"{datetime.now(timezone.utc).date()}, commit {commit.stdout.strip() or 'unknown'}; {machine()}; {packages}."
    )
    return f"# Speed and memory, measured\n\n{measured}\n"


if __name__ == "__main__":
    main()
