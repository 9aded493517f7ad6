"""JSON as language models write it: in prose, fenced, with comments and commas too many, other quotes, or cut off.

Read character by character into lists, dicts, texts, numbers, booleans and None; nothing is evaluated. What was cut off
is left out: of a list, the item that is not whole; of an object, the value that is not. An object or a list that was
itself cut off is kept with what it has, if it has a name or is the outermost.

A quote inside a text should be escaped, and often is not: `"the sign "EXIT" above"`. So a quote ends a value only where
what follows could follow a value.
"""

import re
from collections.abc import Iterator
from typing import Any

_DEPTH = 24  # of objects and lists within each other
_EFFORT = 8  # times that the text is read, on average
_HEX = re.compile(r"\\u([0-9a-fA-F]{4})")
_OPENS = re.compile(r"[{\[]")
_NUMBER = re.compile(r"[-+]?(?:\d[\d_]{0,40})?(?:\.\d{0,40})?(?:[eE][-+]?\d{1,3})?")
_WORD = re.compile(r"[^\W\d][\w-]{0,60}")
_SKIP = re.compile(r"\s+|//[^\n]*|#[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
# Which quotes may close a text that each opens. Models mix them up.
_CLOSES = {
    '"': '"', "'": "'", "“": "”“\"", "”": "”“\"", "„": "“”\"", "‘": "’‘'", "’": "’'", "«": "»", "»": "«", "＂": "＂",
}  # fmt: skip
_PLAIN = {opening: re.compile(rf"[^{closing}\\]+") for opening, closing in _CLOSES.items()}
_GAP = r"(?>\s+|//[^\n]{0,300}\n|/\*.{0,300}?\*/|\#[^\n]{0,300}\n){0,100}+"
# What may follow a value: its container ends, the text ends, or the next item or key begins.
_AFTER_VALUE = re.compile(
    rf"{_GAP}(?:[\]}}]|\Z|,{_GAP}(?:[\]}}{{\[]|\Z|-?\d|(?:true|false|null)\b|[\w-]{{1,60}}\s*:"
    rf"|(?P<quote>[{''.join(_CLOSES)}])))",
    re.DOTALL | re.IGNORECASE,
)
_NEXT_KEY = re.compile(rf"[\w .-]{{1,60}}[{''.join(_CLOSES)}]\s*:")
_SWALLOWED = re.compile(rf"[{''.join(_CLOSES)}]\s*:\s*[{''.join(_CLOSES)}\[{{]")
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None, "nan": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


class _NoJSON(Exception):
    """The text is something else from here on."""


def find_values(text: str) -> Iterator[tuple[Any, bool]]:
    """(value, whether it is whole) of each outermost object or list in a text, in order."""
    at = spent = 0
    while (at := _next_start(text, at)) >= 0:
        reader = _Reader(text, at)
        try:
            value, whole = reader.value(0)
        except _NoJSON:
            # What stands inside may still be some; up to a limit, or a long text could take for ever.
            spent += reader.at - at
            at = at + 1 if spent < _EFFORT * len(text) else max(at + 1, reader.at)
        else:
            yield value, whole
            at = reader.at


def _next_start(text: str, at: int) -> int:
    match = _OPENS.search(text, at)
    return match.start() if match else -1


class _Reader:
    """Reads one value; `at` is how far it came."""

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at
        self._in_object: list[bool] = []  # for each container that is open

    def value(self, depth: int) -> tuple[Any, bool]:
        """(value, whether it is whole) from here. Raises _NoJSON."""
        c = self._peek()
        if depth > _DEPTH:
            raise _NoJSON
        if c in ("{", "["):
            self._in_object.append(c == "{")
            try:
                return self._object(depth) if c == "{" else self._list(depth)
            finally:
                self._in_object.pop()
        if c in _CLOSES:
            return self._string()
        return self._bare()

    def _peek(self) -> str:
        """The next character that counts; "" at the end."""
        while match := _SKIP.match(self.text, self.at):
            self.at = match.end()
        return self.text[self.at : self.at + 1]

    def _list(self, depth: int) -> tuple[list, bool]:
        self.at += 1
        items = []
        while True:
            c = self._peek()
            if c == ",":
                self.at += 1
            elif c == "]":
                self.at += 1
                return items, True
            elif not c:
                return items, False
            else:
                item, whole = self.value(depth + 1)
                if not whole:
                    return items, False
                items.append(item)
                self._expect(",]")

    def _object(self, depth: int) -> tuple[dict, bool]:
        self.at += 1
        found: dict[str, Any] = {}
        while True:
            c = self._peek()
            if c == ",":
                self.at += 1
            elif c == "}":
                self.at += 1
                return found, True
            elif not c:
                return found, False
            else:
                key, whole = self._string(key=True) if c in _CLOSES else self._key()
                if whole and self._expect(":") == ":":
                    self.at += 1
                    if not self._peek():
                        return found, False
                    value, whole = self.value(depth + 1)
                    if whole or isinstance(value, (dict, list)):
                        found[key] = value
                if not whole:
                    return found, False
                self._expect(",}")

    def _expect(self, characters: str) -> str:
        """The next character, which has to be one of these or the end."""
        c = self._peek()
        if c and c not in characters:
            raise _NoJSON
        return c

    def _key(self) -> tuple[str, bool]:
        match = _WORD.match(self.text, self.at)
        if not match:
            raise _NoJSON
        self.at = match.end()
        return match[0], True

    def _bare(self) -> tuple[Any, bool]:
        """A number or a constant; not whole if the text ends with it, for more may have been to come."""
        if (match := _WORD.match(self.text, self.at)) and match[0].lower() in _CONSTANTS:
            self.at = match.end()
            return _CONSTANTS[match[0].lower()], True
        match = _NUMBER.match(self.text, self.at)
        if not match:
            raise _NoJSON
        try:
            number = float(match[0].replace("_", ""))
        except ValueError:
            raise _NoJSON from None
        self.at = match.end()
        return number, self.at < len(self.text)

    def _string(self, *, key: bool = False) -> tuple[str, bool]:
        opening = self.text[self.at]
        closing, plain = _CLOSES[opening], _PLAIN[opening]
        self.at += 1
        parts, start, inner = [], self.at, False
        while self.at < len(self.text):
            if match := plain.match(self.text, self.at):
                parts.append(match[0])
                self.at = match.end()
            elif self.text[self.at] in closing:
                self.at += 1
                if key or self._ends_value():
                    # A text that goes on over the next key is none: a comma or a quote is missing.
                    if inner and _SWALLOWED.search(self.text, start, self.at):
                        raise _NoJSON
                    return "".join(parts), True
                parts.append(self.text[self.at - 1])
                inner = True
            else:
                parts.append(self._escape())
        return "".join(parts), False

    def _ends_value(self) -> bool:
        """Whether the quote before this place ends a value, and does not stand inside of it."""
        match = _AFTER_VALUE.match(self.text, self.at)
        if match is None:
            return False
        if match["quote"] is None or not self._in_object[-1]:
            return True
        # In an object a key follows the comma; in a sentence anything.
        return _NEXT_KEY.match(self.text, match.end()) is not None or match.end() >= len(self.text)

    def _escape(self) -> str:
        c = self.text[self.at + 1 : self.at + 2]
        match = _HEX.match(self.text, self.at)
        if not match:
            self.at += 2
            return _ESCAPES.get(c, c)
        self.at = match.end()
        code = int(match[1], 16)
        # Characters above U+FFFF are written as two halves.
        low = _HEX.match(self.text, self.at) if 0xD800 <= code < 0xDC00 else None
        if low and 0xDC00 <= int(low[1], 16) < 0xE000:
            self.at = low.end()
            return chr(0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00)
        return chr(code)
