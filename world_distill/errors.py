"""Errors that a user can mend, and what a process of a job does when it fails."""

import difflib
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something that the person at the keyboard can mend; its message says what and where, and how to mend it.

    Attributes:
      remedy: what to do, as the message says it; "" where the message is one text.
      command: a call or a flag that does it; "" for none.
    """

    def __init__(self, what: str = "", *, remedy: str = "", command: str = ""):
        """The message is `what`, and behind it `remedy` and `command`, where there are such."""
        self.remedy, self.command = remedy, command
        rest = ": ".join(filter(None, (remedy, command)))
        super().__init__(f"{what}; {rest}" if rest else what)


class SettingError(UserError, ValueError):
    """A setting, of a config or a flag, that is outside of what it may be."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question that names what `word` is most like among the known words, or the list of them all."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"


class Unreachable(UserError):
    """No server can be reached now; one may be starting."""


_on_failure: list[Callable[[], None]] = []


def on_failure(call: Callable[[], None]) -> None:
    """Has `call` made when a command ends with an error, such as to tell the other processes of its job."""
    _on_failure.append(call)


def report_failure() -> None:
    """Makes the calls of `on_failure`. The command line does this before it prints the error."""
    for call in _on_failure:
        call()
