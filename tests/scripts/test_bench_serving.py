"""The measurement of serving runs, and its load finds every answer in its place."""

import pytest

from tests.scripts.launching import printed_by_bench


@pytest.mark.slow
def test_serving_is_measured():
    sizes = ["--small", "--rounds", "1", "--tokens", "8", "--requests", "24", "--clients", "6"]
    printed = printed_by_bench("serving.py", *sizes)
    for line in ("bare generate", "worker, streaming", "answers alike: True", "24 answered", " 0 not the answer"):
        assert line in printed
