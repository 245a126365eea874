"""What the commands share: flags, one-line mistakes, files that appear whole."""

import argparse

import pytest

from llava.utils import mistakes_in_one_line, one_line, positive_int, write_atomically, write_text


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "x", "²"])
def test_what_is_no_positive_whole_number_is_said(text):
    with pytest.raises(argparse.ArgumentTypeError, match="whole number of at least 1"):
        positive_int(text)


def test_a_positive_whole_number_is_read():
    assert [positive_int(text) for text in ("1", "32")] == [1, 32]


def test_an_error_of_many_lines_is_told_in_one():
    assert one_line(ValueError("  a\n b\n\n\tc ")) == "error: a b c"


@pytest.mark.parametrize(("kinds", "error"), [([], ValueError), ([], FileNotFoundError), ([(KeyError,)], KeyError)])
def test_a_mistake_ends_the_command_with_its_line(kinds, error):
    with pytest.raises(SystemExit) as end, mistakes_in_one_line(*kinds):
        raise error("a\nb")
    assert str(end.value.code).startswith("error: ")
    assert "\n" not in str(end.value.code)


@pytest.mark.parametrize(("kinds", "error"), [([], KeyError), ([(KeyError,)], ValueError)])
def test_another_error_keeps_its_traceback(kinds, error):
    with pytest.raises(error), mistakes_in_one_line(*kinds):
        raise error("a")


def test_a_text_is_written_into_a_new_folder_for_everyone_to_read(tmp_path):
    file = tmp_path / "new/deep/file.txt"
    write_text(file, "é\n")
    assert file.read_bytes() == "é\n".encode()
    assert file.stat().st_mode & 0o777 == 0o644
    assert list(file.parent.iterdir()) == [file]


def test_a_writing_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "file.txt"
    write_text(file, "old")

    def fail(temporary):
        temporary.write_text("half")
        assert file.read_text() == "old"  # not touched while the new one grows
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, fail)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
