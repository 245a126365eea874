"""A JSON list of any length, one value at a time: what is in memory is a window of the file's text."""

import json
import re
from collections.abc import Iterator
from json import JSONDecodeError
from pathlib import Path
from typing import Any, BinaryIO

WINDOW_BYTES = 1 << 22
# An error this near the window's end may be the window's doing: the longest token it can cut is a pair of \u escapes.
LONGEST_TOKEN = 16

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


def read_json_array(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Each value of the list as the text that it is in the file, and decoded.

    Raises:
        ValueError: The file is malformed, or no list; with the place in it.
    """
    window = _Window(path, file)
    if (opening := window.peek()) != "[":
        found = "an object" if opening == "{" else kind_of(window.value()[1])
        raise ValueError(
            f"{path}: expected a JSON list of records, found {found}. A file with a record per line is a .jsonl."
        )
    window.at += 1
    if window.peek() == "]":
        mark, window.at = "]", window.at + 1
    else:
        mark = ","
    while mark == ",":
        window.peek()
        yield window.value()
        mark = window.peek()
        if mark not in (",", "]"):
            raise window.malformed("Expecting ',' delimiter", window.at)
        window.at += 1
    if window.peek():
        raise window.malformed("Extra data", window.at)


def decode_utf8(data: bytes, path: Path, start: int) -> str:
    """Text of bytes that stand at `start` in the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {start + error.start}: not UTF-8 text.") from error


def kind_of(value: object) -> str:
    """What JSON calls it, for a message."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "nothing"}
    return names.get(type(value), "a number")


class _Window:
    """The text from `at` on, as far as it was read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.text, self.at = "", 0
        self._left = b""  # the start of a character whose rest is still to be read
        self._num_bytes = 0  # decoded so far
        self._line, self._column = 1, 1  # of the text's first character
        if file.read(3) != b"\xef\xbb\xbf":  # the byte order mark
            file.seek(0)
        self._num_bytes = file.tell()

    def peek(self) -> str:
        """Go to the next character that is no space; "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._read_on():
                return ""

    def value(self) -> tuple[str, Any]:
        """The value that begins here, and its text."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos + LONGEST_TOKEN >= len(self.text)
                if unfinished and self._read_on():
                    continue
                raise self.malformed(error.msg, error.pos) from error
            # A number might go on, at once or after what looks like its end: 1 in 1.5, 1 in 1e5.
            ended = self.text[end : end + 1] not in ("", ".", "e", "E") or end + LONGEST_TOKEN < len(self.text)
            if ended or not self._read_on():
                text, self.at = self.text[self.at : end], end
                return text, value

    def malformed(self, reason: str, at: int) -> ValueError:
        line, column = self._place(at)
        return ValueError(
            f"{self.path}, line {line}, column {column}: malformed JSON: {reason}. Expected one list of records."
        )

    def _place(self, at: int) -> tuple[int, int]:
        num_newlines = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) if num_newlines else self._column + at
        return self._line + num_newlines, column

    def _read_on(self) -> bool:
        """Let go of the text before `at` and read more after it; False at the end of the file."""
        # As much again as is unread, so that a long value is not decoded anew for every few bytes of it.
        data = self.file.read(max(WINDOW_BYTES, len(self.text) - self.at))
        if not data:
            if self._left:
                decode_utf8(self._left, self.path, self._num_bytes)
            return False
        data = self._left + data
        whole = _end_of_whole_characters(data)
        more = decode_utf8(data[:whole], self.path, self._num_bytes)
        self._left = data[whole:]
        self._num_bytes += whole
        self._line, self._column = self._place(self.at)
        self.text, self.at = self.text[self.at :] + more, 0
        return True


def _end_of_whole_characters(data: bytes) -> int:
    """Where a last character that is cut begins: at most three bytes before the end."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte >= 0xC0:  # begins a character of 2 bytes, from 0xE0 of 3, from 0xF0 of 4
            size = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(data) - back if size > back else len(data)
        if byte < 0x80:
            break
    return len(data)
