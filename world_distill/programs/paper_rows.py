"""The rows of the paper's table as runs: which config each has for a seed, in which folder, and by which commands.

A run is what its commands make: `train` and `evaluate` with the config's address and plain overrides. `reproduce` calls
the same functions with the same values, so each row can be made again alone.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from world_distill import build
from world_distill.data.records.reader import RecordError, RecordReader
from world_distill.errors import UserError, did_you_mean
from world_distill.programs import equal_compute
from world_distill.programs.evaluate import ROLES

SHARD = 512  # clips of the Demonstrator in one file: what an interruption costs at most


@dataclasses.dataclass(frozen=True)
class Study:
    """What is to be reproduced.

    Attributes:
      config: address of the config, such as "wan22_5b:debug"; its section `reproduce` has the rows.
      overrides: changes for every row, as the texts of the command line.
      own: changes for one row alone, by its name.
      workdir: folder of everything that is made.
      seeds: each row is made once with each.
      rows: names of those that are wanted. Empty: all.
      split: record set to score on.
      limit: score the first tasks only; 0 takes all.
      noises: clips of each task.
    """

    config: str
    workdir: pathlib.Path
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0, 1, 2)
    rows: Sequence[str] = ()
    split: str = "test"
    limit: int = 0
    noises: int = 1


@dataclasses.dataclass(frozen=True)
class Run:
    """A row with one seed.

    Attributes:
      row: its name.
      role: whose clips are scored.
      address, overrides: what `config` was loaded from.
      folder: of the run.
      is_reference: whether other rows get its compute.
      makes_records: whether its records are drawn, because the config names none.
      shown: the set of the Demonstrator's clips that it learns from, and the run whose Demonstrator makes them.
    """

    row: str
    role: str
    seed: int
    address: str
    overrides: dict[str, str]
    config: ConfigDict
    folder: pathlib.Path
    is_reference: bool
    makes_records: bool
    shown: "tuple[str, Run] | None" = None

    @property
    def trains(self) -> bool:
        """Whether there is an Executor to train."""
        return self.role == "executor"

    @property
    def steps(self) -> int:
        """Training steps of this run."""
        return self.config.steps if self.trains else 0

    @property
    def flags(self) -> list[str]:
        """The words by which a verb gets this run's config."""
        return ["--config", self.address, *(f"--config.{key}={value}" for key, value in self.overrides.items())]

    @property
    def shards(self) -> int:
        """Files over which clips of its training records are spread."""
        return max(1, -(-count_records(self.config, self.config.train_set) // SHARD))

    def calls(self, study: Study) -> list[list[str]]:
        """The calls of world-distill that make this run, each as its words."""
        folder, made = ["--workdir", str(self.folder)], []
        if self.shown is not None:
            name, by = self.shown
            files = ["--shards", str(shards)] if (shards := by.shards) > 1 else []
            made.append(["demonstrate", *by.flags, "--name", by.config.train_set, "--out", name, *files])
        if self.trains:
            made.append(["train", *self.flags, *folder])
        asked = {"--split": (study.split, "test"), "--limit": (study.limit, 0), "--noises": (study.noises, 1)}
        scoring = [word for flag, (value, usual) in asked.items() if value != usual for word in (flag, str(value))]
        config = [] if self.trains else self.flags
        return [*made, ["evaluate", *config, *folder, "--roles", self.role, *scoring]]


def count_records(config: ConfigDict, name: str) -> int:
    """The records of a set. Of one that is still to be drawn, how many there are at most; 0 where nobody can say."""
    try:
        return len(RecordReader(pathlib.Path(config.data), name))
    except (RecordError, OSError):
        if "scenes" not in config or name not in config.scenes:
            return 0
        return config.scenes[name] * (config.annotator.pairs if name == "train" else config.annotator.test_pairs)


def make_runs(study: Study) -> list[Run]:
    """All runs of a study, seed by seed.

    Raises:
      UserError: the config has no rows, a row is named that it has not, or a row's settings are wrong.
    """
    declared = _declared(study)
    return [run for seed in study.seeds for run in _of_seed(study, declared, seed)]


def _declared(study: Study) -> tuple[Mapping[str, tuple[str, str, dict[str, str]]], str]:
    """By name, each row's role, variant and changes; and the name of the reference."""
    if "seed" in study.overrides:
        raise UserError("--config.seed: each row is made with all of --seeds")
    section = build.load(study.config, study.overrides).get("reproduce")
    if not section or not section.rows:
        raise UserError(
            f"--config {study.config}: it has no rows of the paper's table (its section `reproduce`)",
            remedy="take a config that has them, such as", command="--config sandbox",
        )  # fmt: skip
    rows = {}
    for row in section.rows:
        name, role, variant, *changes = row if len(row) >= 3 else (*row, "", "", "")[:3]
        if role not in ROLES or not variant or not all("=" in change for change in changes):
            raise UserError(f"config.reproduce.rows: {row} is not (NAME, {'|'.join(ROLES)}, VARIANT, KEY=VALUE, ...)")
        pairs = (change.partition("=") for change in changes)
        rows[name] = role, variant, {key: value for key, _, value in pairs}
    for name in (section.reference, *study.rows, *study.own):
        if name not in rows:
            raise UserError(f"there is no row {name!r}; {did_you_mean(name, rows)}")
    if rows[section.reference][0] != "executor":
        raise UserError(f"config.reproduce.reference = {section.reference}: this row trains nothing")
    return rows, section.reference


def _of_seed(study: Study, declared: tuple[Mapping, str], seed: int) -> list[Run]:
    rows, reference = declared
    first = _run(study, reference, rows[reference], seed, None)
    return [
        first if name == reference else _run(study, name, rows[name], seed, first)
        for name in rows
        if not study.rows or name in study.rows
    ]


def _run(study: Study, name: str, declared: tuple[str, str, Mapping[str, str]], seed: int, first: Run | None) -> Run:
    """A row with a seed; `first` is the reference with this seed, None for the reference itself."""
    role, variant, changes = declared
    # What is not the variant in the config's argument, such as kinds=full, is every row's.
    base, _, argument = study.config.partition(":")
    address = f"{base}:{','.join([variant, *(part for part in argument.split(',') if '=' in part)])}"
    chosen = dict(changes) | dict(study.own.get(name, {}))
    overrides = dict(study.overrides) | chosen | {"seed": str(seed)}
    folder = study.workdir / "runs" / name / str(seed)
    try:
        config = build.load(address, overrides)
        makes_records = not config.data
        if makes_records:
            # A process that draws records has one device (`prepare.make_records`), and so has the row's own command.
            overrides |= {"data": str(study.workdir / "data" / str(seed))}
            overrides.setdefault("host_devices", "1")
        shown = None
        if role == "executor" and config.objective.kind == "sft" and "train_set" not in chosen and first is not None:
            shown = f"{first.config.train_set}_shown_{seed}", first
            overrides["train_set"] = shown[0]
        plain = build.load(address, overrides)
        config = equal_compute.without_idle_guidance(plain.copy_and_resolve_references())
        if first is not None and role == "executor" and "steps" not in chosen:
            with config.unlocked():
                config.steps = equal_compute.equal_steps(config, first.config)
                config.optimizer.learning_rate = equal_compute.until(config.optimizer.learning_rate, config.steps)
        overrides |= _changed(plain, config)
        return Run(
            name, role, seed, address, overrides, build.load(address, overrides), folder, is_reference=first is None,
            makes_records=makes_records, shown=shown,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"row {name}: {error}") from error


_ADJUSTED = ("steps", "optimizer.learning_rate", "demonstrator.guidance", "demonstrator.negative")


def _changed(before: Any, after: Any) -> dict[str, str]:
    """What equal compute and unused guidance changed in a config, as overrides."""
    changed = {}
    for key in _ADJUSTED:
        section, _, name = key.rpartition(".")
        old, new = ((config[section] if section else config)[name] for config in (before, after))
        if old != new:
            changed[key] = str(new)
    return changed
