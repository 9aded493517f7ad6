"""Configs: find one, override its leaves, compare it, and hand its sections to typed code.

A config is a Python file with `get_config(arg)` that returns a `ConfigDict` whose leaves are numbers,
texts, booleans, None and tuples of those. Everything it can be told is a key that it already has: an
unknown key is an error that names the nearest ones, so a misspelt override never trains a model.
"""

import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import json
import os
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import config_dict

from world_distill.errors import SettingError, UserError
from world_distill.settings import addresses, defaults, old_configs, ranges
from world_distill.settings.objective import Schedule

ConfigDict = config_dict.ConfigDict
T = TypeVar("T")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


# ---- Finding and loading


def packaged_configs() -> dict[str, pathlib.Path]:
    """The configs that come with the project, by name: from a checkout or an installed package."""
    package = pathlib.Path(__file__).resolve().parents[1]
    # A wheel carries configs/ inside the package, a checkout has it beside the package.
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            files = sorted(folder.glob("*.py"))
            return {f.stem: f for f in files if not f.stem.startswith("_")}
    return {}


def load_config(spec: str, overrides: Mapping[str, Any] | Iterable[str] = ()) -> ConfigDict:
    """Loads `path/to/file.py[:arg]`, or a packaged config by its bare name, `name[:arg]`.

    `overrides` maps dotted keys to values, or lists `key=value`. Texts are parsed by the type of the
    leaf they replace. The result is locked: no key can be added to it.

    Raises:
      UserError: no such file, no `get_config` in it, an unknown key, or a value of the wrong type.
      SettingError: a value out of its range (`settings.ranges`), of an override or of the file.
    """
    name, _, arg = spec.partition(":")
    path = _find(name)
    config = _call_get_config(path, arg)
    _use_current_addresses(config)
    to_json(config)  # raises on a leaf that could not be written down, before any work is done
    config.lock()
    override(config, overrides)
    _check_ranges(leaves(config))
    return config


def need(config: ConfigDict, *sections: str, what: str) -> None:
    """Refuses a config without the sections that a stage reads; most configs have no such stage.

    Raises:
      UserError: a section is missing; `what` is what reads it.
    """
    if missing := [name for name in sections if name not in config]:
        having = [name for name, path in packaged_configs().items() if set(sections) <= _sections(path)]
        raise UserError(
            f"{what} reads the config's section {missing[0]!r}, which this config has not",
            remedy="take a config that has it, such as", command=f"--config {(having or ['sandbox'])[0]}",
        )  # fmt: skip


def _sections(path: pathlib.Path) -> set[str]:
    try:
        return set(_call_get_config(path, ""))
    except UserError:
        return set()


def _check_ranges(values: Mapping[str, Any]) -> None:
    """Raises SettingError, naming all of them, for values out of their ranges, with their defaults."""
    found = []
    for key, value in values.items():
        if text := ranges.problem(key, value):
            section_, _, name = key.rpartition(".")
            usual = getattr(defaults.SECTIONS.get(section_), name, None)  # the default of a dataclass's field
            found.append(f"config key {text}" + ("" if usual is None else f" (default: --config.{key}={usual})"))
    if found:
        raise SettingError("\n  ".join(found))


def _use_current_addresses(config: ConfigDict) -> None:
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            _use_current_addresses(value)
        elif key == "factory" and isinstance(value, str):
            config[key] = addresses.current(value)


def freeze(config: ConfigDict) -> config_dict.FrozenConfigDict:
    """A copy of the config that refuses every assignment."""
    return config_dict.FrozenConfigDict(config)


def _find(name: str) -> pathlib.Path:
    packaged = packaged_configs()
    if name in packaged:
        return packaged[name]
    path = pathlib.Path(name)
    if name.endswith(".py") and path.is_file():
        return path
    near = _nearest(path.stem, packaged)
    hint = f"did you mean {near}?" if near else f"packaged: {', '.join(packaged) or 'none'}"
    what = "no such config file" if name.endswith(".py") else "no packaged config of this name"
    raise UserError(f"--config {name}: {what} ({hint})")


def _call_get_config(path: pathlib.Path, arg: str) -> ConfigDict:
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(f"{path}: cannot be loaded: {type(e).__name__}: {e}") from e
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{path}: has no function get_config(arg)")
    if arg and not inspect.signature(get_config).parameters:
        raise UserError(f"{path}: its get_config takes no argument, but was given ':{arg}'")
    try:
        config = get_config(arg) if inspect.signature(get_config).parameters else get_config()
    except UserError as e:
        raise UserError(f"{path}: {e}") from e
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config returned a {type(config).__name__}, not a ConfigDict")
    return config


# ---- Leaves and overrides


def leaves(config: ConfigDict) -> dict[str, Any]:
    """Every value of the config by its dotted key, in order. An empty section counts as a value."""
    found = {}
    for key in config:
        value = config[key]
        if isinstance(value, ConfigDict) and len(value):
            found |= {f"{key}.{inner}": leaf for inner, leaf in leaves(value).items()}
        else:
            found[key] = value
    return found


def override(config: ConfigDict, overrides: Mapping[str, Any] | Iterable[str]) -> None:
    """Sets leaves of `config` in place; see `load_config`.

    `none` sets None, except where the leaf holds a text: there it is the text "none".
    """
    if not isinstance(overrides, Mapping):
        overrides = dict(_split(item) for item in overrides)
    known = leaves(config)
    if unknown := [key for key in overrides if key not in known]:
        raise UserError("; ".join(_unknown(key, known) for key in unknown))
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section_ = config
        for parent in parents:
            section_ = section_[parent]
        kind = section_.get_type(last)
        parsed = _parse(key, value, known[key], kind) if isinstance(value, str) else value
        if last == "factory" and isinstance(parsed, str):
            parsed = addresses.current(parsed)
        if kind is int and isinstance(parsed, float):  # ml_collections would let it change the type
            raise UserError(f"config key {key}: expected int, got {value!r}")
        try:
            section_[last] = parsed
        except TypeError as e:
            expected = kind.__name__
            raise UserError(f"config key {key}: expected {expected}, got {value!r}") from e
    _check_ranges({key: leaves(config)[key] for key in overrides})


def _split(item: str) -> tuple[str, str]:
    key, equals, value = item.partition("=")
    if not equals:
        raise UserError(f"override {item!r} is not of the form key=value")
    return key.strip(), value


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"config key {key!r} is a section; set one of {', '.join(inside)}"
    near = _nearest(key, known)
    hint = f"did you mean {near}?" if near else f"the keys are {', '.join(known)}"
    return f"unknown config key {key!r}; {hint}"


def _nearest(word: str, known: Iterable[str]) -> str:
    def likeness(key: str) -> float:
        # The right name in the wrong section is the commonest slip, so the last part counts alone too.
        pairs = ((word, key), (word.rsplit(".", 1)[-1], key.rsplit(".", 1)[-1]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    scores = {key: likeness(key) for key in known}
    least = max(0.6, max(scores.values(), default=0.0) - 0.1)
    near = sorted((key for key in scores if scores[key] >= least), key=lambda key: -scores[key])
    return " or ".join(repr(key) for key in near[:3])


def _parse(key: str, text: str, current: Any, kind: type) -> Any:
    if text.lower() == "none" and not isinstance(current, str):
        return None
    if kind is bool and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    try:
        if kind is str and text.startswith("~/"):
            return os.path.expanduser(text)  # a shell leaves the ~ behind a = as it is
        if kind is int:
            return _whole(text)
        if kind in (float, str):
            return kind(text)
        if kind in (tuple, list):
            if _is_schedule(key) and (value := _number(text)) is not None:
                return ((0, value),)  # the same from the first step on
            return _parse_sequence(text, current or ())
        if kind is type(None):
            return _literal_or_text(text)
    except (ValueError, SyntaxError) as e:
        like = f", like {current!r}" if kind in (tuple, list) else ""
        if _is_schedule(key):
            like = ": a number, or points ((step, value), ...)" + like
        raise UserError(f"config key {key}: expected {kind.__name__}{like}, got {text!r}") from e
    raise UserError(f"config key {key}: expected {kind.__name__}, got {text!r}")


def _parse_sequence(text: str, current: Iterable[Any]) -> tuple:
    kinds = {type(item) for item in current}
    if kinds == {str} and not text.strip().startswith(("(", "[", "'", '"')):
        return tuple(item.strip() for item in text.split(",") if item.strip())
    value = ast.literal_eval(text)
    items = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if kinds == {float}:
        items = tuple(float(item) if type(item) is int else item for item in items)
    if len(kinds) == 1 and not {type(item) for item in items} <= kinds:
        raise ValueError("items of another type")
    return items


def _is_schedule(key: str) -> bool:
    """Whether a key holds (step, value) points, for which a number may stand."""
    section_, _, name = key.rpartition(".")
    fields = getattr(defaults.SECTIONS.get(section_), "__dataclass_fields__", {})
    return name in fields and fields[name].type == Schedule


def _whole(text: str) -> int:
    """A whole number, also as 1e3. Raises ValueError for any other."""
    try:
        return int(text)
    except ValueError:
        if (value := _number(text)) is None or not value.is_integer():
            raise
        return int(value)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _literal_or_text(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parse_arg(arg: str | None, **defaults: Any) -> types.SimpleNamespace:
    """Parses a config's own argument, `name=value,name=value`, by the types of `defaults`.

    A bare word is the name of a switch (a default of False) or else the value of the first default:
    `parse_arg("fast,seed=3", variant="base", seed=0)` gives `variant="fast", seed=3`.

    Raises:
      UserError: an unknown name, one that is given twice, or a value of the wrong type.
    """
    values, given = dict(defaults), {}
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            switch = values.get(name) is False
            name, text = (name, "true") if switch else (next(iter(defaults), name), name)
        if name not in defaults:
            takes = ", ".join(f"{k}={v!r}" for k, v in defaults.items()) or "nothing"
            raise UserError(f"unknown argument {name!r}; the config takes {takes}")
        if name in given:
            raise UserError(f"{given[name]!r} and {text!r} are both given as the {name}: a config takes one")
        given[name] = text
        values[name] = _parse(name, text, defaults[name], type(defaults[name]))
    return types.SimpleNamespace(**values)


# ---- Writing down and comparing


def to_json(config: ConfigDict) -> str:
    """The config as JSON, keys sorted. Raises UserError naming a leaf that JSON cannot hold."""
    return json.dumps(_plain(config, ""), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
    """The locked config that `to_json` of this or an earlier version wrote; sequences come back as tuples."""
    try:
        plain = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"not a config: {e}") from e
    if not isinstance(plain, dict):
        raise UserError(f"not a config: a JSON {type(plain).__name__}, not an object")
    return ConfigDict(_tuples(translate(plain))).lock()


def translate(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Plain settings that this or an earlier version wrote, in today's keys, units and addresses."""
    today = addresses.translate(old_configs.translate(plain))
    return defaults.with_newer_keys(today) if "objective" in today else today


def fingerprint(config: ConfigDict) -> str:
    """sha256 of the config's keys and values, whatever their order; tuples and lists count alike."""
    plain = json.dumps(_plain(config, ""), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def diff(a: ConfigDict, b: ConfigDict) -> list[str]:
    """What differs, one `key: a -> b` a line, sorted by key; [] exactly for equal fingerprints."""
    texts = [{k: json.dumps(_plain(v, k), ensure_ascii=False) for k, v in leaves(c).items()} for c in (a, b)]
    lines = []
    for key in sorted(texts[0].keys() | texts[1].keys()):
        old, new = (text.get(key, "(absent)") for text in texts)
        if old != new:
            lines.append(f"{key}: {old} -> {new}")
    return lines


def _plain(value: Any, key: str) -> Any:
    if isinstance(value, (ConfigDict, dict)):
        return {k: _plain(value[k], f"{key}.{k}".lstrip(".")) for k in value}
    if isinstance(value, (tuple, list)):
        return [_plain(item, key) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"config key {key} holds a {type(value).__name__}, which cannot be written down")


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


# ---- Sections as dataclasses


def section(config: ConfigDict, cls: type[T]) -> T:
    """Builds the dataclass `cls` from a section with the same names; nested dataclasses too.

    A field with a default may be absent from the section.

    Raises:
      UserError: unknown or missing keys (all of them named), or a value that its field's type
        does not take.
    """
    return _build(config, cls, cls.__name__)


def _build(config: ConfigDict, cls: Any, where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    problems = []
    for key in (k for k in config if k not in fields):
        near = _nearest(key, fields)
        problems.append(f"unknown key {key!r}" + (f" (did you mean {near}?)" if near else ""))
    for name, field in fields.items():
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and name not in config:
            problems.append(f"missing key {name!r}")
    if problems:
        raise UserError(f"config section for {where}: {'; '.join(problems)}")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _as(config[key], hints[key], f"{where}.{key}") for key in config})


def _as(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: sections become dataclasses, lists tuples, ints floats."""
    arguments = typing.get_args(hint)
    if isinstance(value, ConfigDict):
        options = [h for h in (hint, *arguments) if dataclasses.is_dataclass(h)]
        return _build(value, options[0], where) if options else value.to_dict()
    if not _fits(value, hint):
        raise UserError(f"config value {where}: {value!r} is not {_name(hint)}")
    options = arguments if isinstance(hint, types.UnionType) else (hint,)
    kinds = {typing.get_origin(option) or option for option in options}
    if isinstance(value, list) and tuple in kinds:
        return tuple(value)
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    return value


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    kind = origin or hint
    if kind in (tuple, list):
        items = [a for a in arguments if a is not Ellipsis]
        same = len(items) == 1
        return isinstance(value, (tuple, list)) and (not same or all(_fits(item, items[0]) for item in value))
    if kind is None or kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (bool, str, dict) else True


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
