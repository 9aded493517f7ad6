"""Loading, overriding, comparing and unpacking configs, and what each says when it cannot."""

import dataclasses
import re
import textwrap
from typing import Literal

import pytest
from ml_collections import ConfigDict, config_dict

from world_distill.errors import UserError
from world_distill.settings import loading as config_lib
from world_distill.settings.loading import load_config

SOURCE = '''
"""A config."""
from ml_collections import ConfigDict, config_dict
from world_distill.settings.loading import parse_arg

def get_config(arg):
    arg = parse_arg(arg, variant="base", seed=0, fast=False)
    c = ConfigDict()
    c.seed = arg.seed
    c.variant = arg.variant
    c.out = "runs"
    c.base = config_dict.placeholder(str)
    c.anything = None
    c.train = ConfigDict(dict(steps=10 if arg.fast else 100, lr=1e-3, ema=True, rank=8))
    c.train.sizes = (1, 2)
    c.train.weights = (1.0, 0.5)
    c.train.kinds = ("go", "push")
    c.train.warmup = c.train.get_ref("steps") // 10
    return c
'''


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(SOURCE)
    return str(file)


def fails(pattern):
    return pytest.raises(UserError, match=pattern)


# ---- Loading


def test_argument_reaches_get_config(path):
    assert load_config(path).train.steps == 100
    config = load_config(f"{path}:tall,seed=3,fast")
    assert (config.variant, config.seed, config.train.steps) == ("tall", 3, 10)


def test_get_config_may_take_no_argument(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({'a': 1})\n")
    assert load_config(str(file)).a == 1
    with fails("takes no argument"):
        load_config(f"{file}:x")


def test_loaded_config_is_locked_and_can_be_frozen(path):
    config = load_config(path)
    with pytest.raises(AttributeError):
        config.train.stepz = 1
    frozen = config_lib.freeze(config)
    with pytest.raises(AttributeError):
        frozen.train.steps = 1
    assert config_lib.fingerprint(frozen) == config_lib.fingerprint(config)


def test_missing_file_is_named(tmp_path):
    with fails(re.escape(f"{tmp_path}/none.py: no such config file")):
        load_config(f"{tmp_path}/none.py:x")


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = 1", "no function get_config"),
        ("def get_config(arg):\n    return {}", "returned a dict"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def get_config(:", "SyntaxError"),
        (
            "from ml_collections import ConfigDict\ndef get_config(arg):\n    return ConfigDict({'a': {'f': max}})",
            "config key a.f holds a builtin",
        ),
    ],
)
def test_broken_file_is_named_with_what_is_wrong(tmp_path, source, message):
    file = tmp_path / "broken.py"
    file.write_text(source)
    with fails(message):
        load_config(str(file))


def test_bare_name_finds_a_packaged_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # wherever the caller stands
    monkeypatch.setattr(config_lib, "__file__", str(tmp_path / "site/world_distill/settings/loading.py"))
    beside, inside = tmp_path / "site/configs", tmp_path / "site/world_distill/configs"
    for folder, value in ((beside, 1), (inside, 2)):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / "world.py").write_text(
            f"from ml_collections import ConfigDict\ndef get_config(arg):\n    return ConfigDict({{'a': {value}}})\n"
        )
        assert load_config("world:x").a == value  # as in a checkout, then as installed
    assert list(config_lib.packaged_configs()) == ["world"]
    with fails("did you mean 'world'"):
        load_config("wrold")


def test_every_packaged_config_loads():
    for name in config_lib.packaged_configs():
        config = load_config(name)
        again = config_lib.from_json(config_lib.to_json(config))
        assert config_lib.diff(config, again) == [], name


# ---- Overrides


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("train.steps", "7", 7),
        ("train.lr", "3e-4", 3e-4),
        ("train.lr", "1", 1.0),
        ("train.ema", "false", False),
        ("train.ema", "1", True),
        ("train.rank", "none", None),
        ("out", "a=b", "a=b"),
        ("out", "none", "none"),  # a text stays a text
        ("out", "3", "3"),
        ("base", "x/y", "x/y"),
        ("base", "none", None),
        ("anything", "3", 3),
        ("anything", "word", "word"),
        ("train.sizes", "(3,4,5)", (3, 4, 5)),
        ("train.sizes", "3,4", (3, 4)),
        ("train.sizes", "3", (3,)),
        ("train.sizes", "[]", ()),
        ("train.weights", "1,2", (1.0, 2.0)),
        ("train.kinds", "go", ("go",)),
        ("train.kinds", "go, carry", ("go", "carry")),
        ("train.kinds", "('go',)", ("go",)),
    ],
)
def test_override_takes_the_type_of_its_leaf(path, key, text, value):
    for overrides in ({key: text}, [f"{key}={text}"]):
        got = config_lib.leaves(load_config(path, overrides))[key]
        assert got == value and type(got) is type(value)


def test_override_with_a_value_of_python(path):
    assert load_config(path, {"train.steps": 4, "train.sizes": (9,)}).train.sizes == (9,)
    for value in (4.5, "x"):
        with fails("train.steps: expected int"):
            load_config(path, {"train.steps": value})
    with fails("train.ema: expected bool"):
        load_config(path, {"train.ema": 3})


def test_override_reaches_what_refers_to_the_leaf(path):
    assert load_config(path, {"train.steps": "50"}).train.warmup == 5


@pytest.mark.parametrize(
    "item, message",
    [
        ("train.steps=1.5", "train.steps: expected int, got '1.5'"),
        ("train.steps=true", "expected int"),
        ("train.lr=fast", "train.lr: expected float"),
        ("train.ema=maybe", "train.ema: expected bool"),
        ("train.sizes=(1,'a')", r"train.sizes: expected tuple, like \(1, 2\)"),
        ("train.sizes=(1", "expected tuple"),
        ("train.sizes=a,b", "expected tuple"),
        ("seed", "not of the form key=value"),
        ("train=3", "'train' is a section; set one of train.ema, train.kinds"),
    ],
)
def test_wrong_override_is_refused(path, item, message):
    with fails(message):
        load_config(path, [item])


@pytest.mark.parametrize(
    "key, near",
    [
        ("train.stepz", "'train.steps'"),
        ("steps", "'train.steps'"),
        ("trian.lr", "'train.lr'"),
        ("sede", "'seed'"),
        ("train.seed", "'seed'"),
    ],
)
def test_unknown_key_names_the_nearest(path, key, near):
    with fails(f"unknown config key '{key}'; did you mean .*{near}"):
        load_config(path, {key: "1"})


def test_all_unknown_keys_are_named_at_once(path):
    with fails("'train.stepz'.*'xyzzyxyzzy'; the keys are anything, base"):
        load_config(path, ["train.stepz=1", "xyzzyxyzzy=1"])


# ---- parse_arg


def test_parse_arg():
    parse = config_lib.parse_arg
    assert vars(parse("", variant="base", seed=0)) == {"variant": "base", "seed": 0}
    assert vars(parse(None, seed=0)) == {"seed": 0}
    assert vars(parse("fast,seed=3", variant="base", seed=0)) == {"variant": "fast", "seed": 3}
    assert parse("debug", variant="base", debug=False).debug is True
    assert parse("variant=none,lr=2", variant="base", lr=0.5).lr == 2.0
    with fails("unknown argument 'sed'; the config takes variant='base', seed=0"):
        parse("sed=3", variant="base", seed=0)
    with fails("'sft' and 'debug' are both given as the variant"):
        parse("sft,debug", variant="base", seed=0)
    with fails("'3' and '4' are both given as the seed"):
        parse("seed=3,seed=4", variant="base", seed=0)
    with fails("seed: expected int"):
        parse("seed=x", seed=0)
    with fails("the config takes nothing"):
        parse("x")


# ---- Comparing


def test_fingerprint_depends_on_values_only():
    a = ConfigDict({"x": 1, "y": {"z": (1, 2), "w": "t"}})
    b = ConfigDict({"y": {"w": "t", "z": [1, 2]}, "x": 1})
    assert config_lib.fingerprint(a) == config_lib.fingerprint(b)
    assert len(config_lib.fingerprint(a)) == 64
    b.x = 2
    assert config_lib.fingerprint(a) != config_lib.fingerprint(b)
    # Pinned: a run is recognised by it years later.
    assert config_lib.fingerprint(ConfigDict({"a": 1})).startswith("015abd7f5cc57a2dd94b7590f04ad808")


def test_json_round_trip(path):
    config = load_config(path)
    again = config_lib.from_json(config_lib.to_json(config))
    assert config_lib.diff(config, again) == []
    assert config_lib.fingerprint(config) == config_lib.fingerprint(again)
    assert again.train.sizes == (1, 2)
    for text in ("{", "[1]"):
        with fails("not a config"):
            config_lib.from_json(text)


def test_diff_lists_each_key(path):
    a, b = load_config(path), load_config(path, {"train.steps": "7", "out": "x"})
    assert config_lib.diff(a, b) == ['out: "runs" -> "x"', "train.steps: 100 -> 7", "train.warmup: 10 -> 0"]
    c = ConfigDict({"a": {}, "b": 1})
    assert config_lib.diff(c, ConfigDict({"a": {"x": 1}})) == [
        "a: {} -> (absent)",
        "a.x: (absent) -> 1",
        "b: 1 -> (absent)",
    ]


# ---- Sections


@dataclasses.dataclass(frozen=True)
class Inner:
    low: float
    high: float = 1.0


@dataclasses.dataclass(frozen=True)
class Weights:
    beta: float
    kind: Literal["awm", "grpo"]
    inner: Inner
    steps: tuple[int, ...] = (1,)
    rank: int | None = None
    other: Inner | None = None


GOOD = {"beta": 1, "kind": "awm", "inner": {"low": 0.0}, "steps": [1, 2]}


def test_section_builds_a_dataclass():
    got = config_lib.section(ConfigDict(GOOD), Weights)
    assert got == Weights(1.0, "awm", Inner(0.0), (1, 2)) and type(got.beta) is float and type(got.steps) is tuple
    assert config_lib.section(ConfigDict(GOOD | {"other": {"low": 1.0}}), Weights).other == Inner(1.0)
    assert config_lib.section(config_dict.FrozenConfigDict(GOOD), Weights) == got


@pytest.mark.parametrize(
    "change, message",
    [
        ({"betta": 1}, r"Weights: unknown key 'betta' \(did you mean 'beta'\?\)"),
        ({"beta": "x"}, "Weights.beta: 'x' is not float"),
        ({"beta": True}, "Weights.beta: True"),
        ({"kind": "ppo"}, "Weights.kind: 'ppo'"),
        ({"rank": 1.5}, "Weights.rank: 1.5"),
        ({"steps": (1, "a")}, "Weights.steps"),
        ({"inner": {"low": 0.0, "up": 1}}, "Weights.inner: unknown key 'up'"),
        ({"inner": {"high": 0.0}}, "Weights.inner: missing key 'low'"),
    ],
)
def test_section_refuses_what_does_not_fit(change, message):
    with fails(message):
        config_lib.section(ConfigDict(GOOD | change), Weights)


def test_section_names_all_that_is_wrong():
    with fails("unknown key 'a'.*missing key 'beta'; missing key 'kind'; missing key 'inner'"):
        config_lib.section(ConfigDict({"a": 1}), Weights)


def test_config_may_start_from_another(tmp_path, path):
    file = tmp_path / "child.py"
    file.write_text(
        textwrap.dedent(f"""
        from world_distill.settings.loading import load_config
        def get_config(arg):
            config = load_config({path!r} + ":" + arg)
            config.train.steps = 5
            return config
        """)
    )
    assert load_config(f"{file}:seed=4", {"train.lr": "2"}).to_dict()["train"]["steps"] == 5
    assert load_config(f"{file}:seed=4").seed == 4
