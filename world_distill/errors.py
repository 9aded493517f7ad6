"""Errors that a user can mend, and what a process of a job does when it fails."""

from collections.abc import Callable


class UserError(Exception):
    """Something that the person at the keyboard can mend; its message says what and where."""


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
