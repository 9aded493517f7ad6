"""Explanations of a config's keys, for `--help-config` and `--config.KEY=?`.

Every text is read where the key is defined: the docstring of a section's dataclass, of a family's `build`, or of the
factory that takes the options.
"""

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import docstring_parser
from ml_collections import ConfigDict

from world_distill.errors import UserError

WIDTH = 110


def documented(thing: Any) -> dict[str, str]:
    """Name -> text of the attributes and arguments that the docstring of a class or a function explains."""
    texts: dict[str, str] = {}
    parts = [thing, thing.__init__] if inspect.isclass(thing) else [thing]
    for part in parts:
        for entry in docstring_parser.parse(inspect.getdoc(part) or "").params:
            for name in entry.arg_name.split(","):
                texts.setdefault(name.strip(), " ".join((entry.description or "").split()))
    return texts


def explain(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(key, value in this config, text) of every leaf whose key starts with the section or key `prefix`.

    Raises:
      UserError: no key starts like that.
    """
    found = False
    for key, value in _leaves(config):
        if not prefix or key == prefix or key.startswith(f"{prefix}."):
            found = True
            yield key, value, _text(config, key)
    if not found:
        raise UserError(f"no key of the config is or begins with {prefix!r}; --help-config prints all of them")


def lines(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """The explanations as lines for a terminal, a heading before each section."""
    last = None
    for key, value, text in explain(config, prefix):
        section = key.rpartition(".")[0]
        if section != last:
            yield f"\n{section or 'top level'}" if last is not None else section or "top level"
            last = section
        default = _default(key)
        differs = default is not None and default != value
        yield f"  --config.{key}={_shown(value)}" + (f"  (default: {_shown(default)})" if differs else "")
        yield from textwrap.wrap(text or "(not documented)", WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _default(key: str) -> Any:
    """The default of a key that a section's dataclass has; None for any other."""
    from world_distill.settings.defaults import SECTIONS, to_section

    section, _, name = key.rpartition(".")
    if section not in SECTIONS:
        return None
    return to_section(SECTIONS[section]()).get(name)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _leaves(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves in the order of the sections' definitions: the top level first, then the sections."""
    from world_distill.settings.defaults import SECTIONS

    known = list(SECTIONS)
    order = sorted(config, key=lambda k: known.index(k) if k in known else len(known)) if not prefix else list(config)
    for key in order:
        if not isinstance(config[key], ConfigDict):
            yield f"{prefix}{key}", config[key]
    for key in order:
        if isinstance(config[key], ConfigDict):
            yield from _leaves(config[key], f"{prefix}{key}.")


def _text(config: ConfigDict, key: str) -> str:
    """The explanation of a leaf; "" where nothing explains it."""
    from world_distill.settings.defaults import SECTIONS

    section, _, name = key.rpartition(".")
    top, *inner = section.split(".")
    if top in SECTIONS and not inner:
        return documented(SECTIONS[top]).get(name, "")
    if top == "rollout":  # weights: one text for all
        return documented(SECTIONS[top]).get("weights", "")
    if inner[:1] == ["options"]:
        return _option(config, top, [*inner[1:], name])
    if top == "model":
        from world_distill import models

        if key == "model.family":
            return f"name of the model family: {' or '.join(models.FAMILIES)}."
        things = models.documented(config.model.family, ".".join(inner))
        return next((text for thing in things if (text := documented(thing).get(name))), "")
    user = next((s for s in config if _takes(config[s], f"@{top}")), None)  # a section that options refer to
    return _option(config, user, [top, name]) if user else ""


def _takes(section: Any, reference: str) -> bool:
    return isinstance(section, ConfigDict) and reference in dict(section.get("options", {})).values()


def _option(config: ConfigDict, section: str, path: list[str]) -> str:
    """The explanation of an option, or of a value inside one, by the docstring of the section's factory."""
    from world_distill.build import find_factory, load_part

    if not config[section].get("factory"):
        if section != "held_out":
            return ""
        section = "judge"  # the held-out judge's options are prepared for a judge of the same kind
    factory = find_factory(config, section)
    judge = config[section].options.get("judge")
    if path[0] == "beside":  # other judges, each with options of its own
        path = path[2:] or path[:1]
    if isinstance(judge, str) and path[-1] not in documented(factory):
        factory = load_part(judge, f"config.{section}.options.judge")
    # An option that is a mapping itself is a dataclass's fields; the factory names the class by `explained_by`.
    for name in path[:-1]:
        inner = getattr(factory, "explained_by", {}).get(name)
        if inner is None:  # a mapping of names of one's own
            return documented(factory).get(name, "")
        factory = inner
    return documented(factory).get(path[-1], "")
