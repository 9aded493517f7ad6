"""The parser of a verb's flags: argparse's, with errors that say what was probably meant."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from world_distill.errors import UserError, did_you_mean

_CHOICE = re.compile(r"argument (?P<flag>.+): invalid choice: '(?P<word>.*)' \(choose from (?P<words>.+)\)")


_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
_QUOTES = "\u201c\u201d\u201e\u2018\u2019\u201a"


def pasted(words: Sequence[str]) -> str:
    """What a command has that is of typography and not of a shell, as it comes from web pages; "" if nothing is."""
    for word in words:
        if word[:1] and (word[0] in _DASHES or (word[0] == "-" and word[1:2] and word[1] in _DASHES)):
            return f"{word}: the dash is one of typography, as web pages have it; type --{word.lstrip('-' + _DASHES)}"
        if word and not word.strip():
            return "a lone space: a backslash that continues a line has to be the last character of that line"
        if word.startswith("--") and any(quote in word for quote in _QUOTES):
            return f"{word}: the quotes are those of typography, as web pages have them; type ' or \""
    return ""


class Parser(argparse.ArgumentParser):
    """An `argparse` parser whose errors are one line, with a suggestion, and name the call that explains the verb."""

    def __init__(self, name: str, help_text: str = "", **options: Any):
        """`name` is the verb, `help_text` its explanation."""
        super().__init__(
            prog=f"world-distill {name}".strip(), description=help_text.strip(), allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter, **options,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2. The usage, often ten lines, would hide the message."""
        if found := _CHOICE.fullmatch(message):
            words = [word.strip("'\" ") for word in found["words"].split(",")]
            message = f"{found['flag']} {found['word']}: {did_you_mean(found['word'], words)}"
            if message.endswith("?"):
                message += f" (there are {', '.join(words)})"
        sys.stderr.write(f"error: {message} (world-distill {self.prog.partition(' ')[2]} --help explains the flags)\n")
        sys.exit(2)

    def parse(self, flags: list[str], keys: Callable[[argparse.Namespace], Mapping[str, Any]]) -> argparse.Namespace:
        """The flags' values. `keys` gives the values of the config that they name, by key; {} where there is none."""
        if problem := pasted(flags):
            self.error(problem)
        args, unknown = self.parse_known_args(flags)
        if unknown:
            values = [word for word in unknown if not word.startswith("-")]
            flag = next((word for word in unknown if word.startswith("-")), unknown[0])
            name, equals, value = flag.partition("=")
            hint = self._meant(name, value if equals else (values or [""])[0], args, keys)
            self.error(f"unrecognized arguments: {' '.join(unknown)}; {hint}" if hint else
                       f"unrecognized arguments: {' '.join(unknown)}")  # fmt: skip
        return args

    def _meant(self, flag: str, value: str, args: argparse.Namespace, keys: Callable) -> str:
        """What was probably meant by a flag that does not exist: a key of the config, or another flag."""
        if not flag.startswith("-"):
            return "a pattern of files stands in quotes, or the shell takes it apart" if os.path.exists(flag) else ""
        flags = [text for action in self._actions for text in action.option_strings if text.startswith("--")]
        word = flag.lstrip("-").replace("-", "_")
        try:
            known = keys(args)
        except UserError:  # it is said when the config is read
            known = {}
        same = [key for key in known if key.rpartition(".")[2] == word or key == word]
        if same:
            # The likeliest first: of the verb's own section, of the whole run, of other stages.
            rank = {key: self._rank(key) for key in same}
            best = [key for key in same if rank[key] == min(rank.values())]
            shown = " or ".join(f"--config.{key}={value or known[key]}" for key in best)
            return f"a value of the config is set with {shown}"
        meant = {key.rpartition(".")[2]: f"--config.{key}={value or known[key]}" for key in reversed(known)}
        meant |= {text.removeprefix("--").replace("-", "_"): text for text in flags}
        near = difflib.get_close_matches(word, meant, n=1)
        return f"did you mean {meant[near[0]]}?" if near else ""

    def _rank(self, key: str) -> int:
        section = key.partition(".")[0] if "." in key else ""
        if section == self.prog.partition(" ")[2]:
            return 0
        return 3 if section in ("pretrain", "scenes", "ablation", "clips") else 2 if section else 1
