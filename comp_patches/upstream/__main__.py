"""`python -m comp_patches.upstream apply|check|revert PATH`: the method into a checkout of LLaVA-NeXT, and out of it.

Needs Python and git alone, so any environment will do, that of the checkout too.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from comp_patches.upstream.checkout import Checkout, RefusedError, open_checkout
from comp_patches.upstream.patch import apply, refuse_unfit, revert, state


def main(arguments: list[str] | None = None) -> int:
    """Do one of the three; the exit code is 0 where all is well."""
    parser = argparse.ArgumentParser(prog="python -m comp_patches.upstream", description=__doc__.partition(":")[0])
    actions = parser.add_subparsers(dest="action", required=True, metavar="apply|check|revert")
    for action, text in (
        ("apply", "copy the method in and add its hooks; twice is once"),
        ("check", "say whether it is applied or can be, and whether training can start there"),
        ("revert", "take everything out again"),
    ):
        actions.add_parser(action, help=text).add_argument("path", type=Path, help="top folder of the checkout")
    options = parser.parse_args(arguments)
    try:
        return {"apply": _apply, "check": _check, "revert": _revert}[options.action](open_checkout(options.path))
    except RefusedError as error:
        for reason in error.reasons:
            _say(f"error: {reason}")
        return 1


def _apply(checkout: Checkout) -> int:
    done = apply(checkout)
    _say(f"{_title(checkout)}: {'applied' if done else 'applied already'}.")
    if defect := checkout.trainer_defect():
        _say(f"warning: {defect}")
    return 0


def _check(checkout: Checkout) -> int:
    refuse_unfit(checkout)
    _say(f"{_title(checkout)}: {state(checkout)}.")
    if defect := checkout.trainer_defect():
        _say(f"error: {defect}")
        return 1
    return 0


def _revert(checkout: Checkout) -> int:
    done = revert(checkout)
    _say(f"{_title(checkout)}: {'reverted' if done else 'there was nothing to revert'}.")
    return 0


def _title(checkout: Checkout) -> str:
    return f"{checkout.name} {checkout.commit} at {checkout.root}"


def _say(line: str) -> None:
    print(line)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
