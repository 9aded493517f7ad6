"""Settings of the parts that a config names: where scenes, tasks, rewards and scores come from.

`factory` is an address, `package:function`. It is called with the section's `options` as keyword arguments; an option
"@world" stands for the config's section `world`. A factory documents its options in its own docstring.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


def _options() -> Any:
    return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ScenesSettings:
    """Scene images that a world draws.

    Attributes:
      factory: address of the function that writes scene images.
      options: keyword arguments of the factory.
      train: scene images to learn from.
      validation: scene images to look at while training and tuning.
      test: scene images for the final table only.
    """

    factory: str = ""
    options: Mapping[str, Any] = _options()
    train: int = 0
    validation: int = 0
    test: int = 0


@dataclasses.dataclass(frozen=True)
class ClipsSettings:
    """Captioned clips that the sandbox's base model is pretrained on.

    Attributes:
      factory: address of the function that makes the source of clips.
      options: keyword arguments of the factory.
    """

    factory: str = ""
    options: Mapping[str, Any] = _options()


@dataclasses.dataclass(frozen=True)
class AnnotatorSettings:
    """The VLM that writes tasks and solutions.

    Attributes:
      factory: address of the annotator.
      options: keyword arguments of the factory.
      pairs: tasks a scene, at most. The paper has 8.
      test_pairs: tasks a scene in validation and test, at most.
      max_side: pixels that the longer side of an image is shrunk to; 0: as it is.
      max_failures: share of the images that the annotator may fail on, 0 to 1.
    """

    factory: str = ""
    options: Mapping[str, Any] = _options()
    pairs: int = 8
    test_pairs: int = 1
    max_side: int = 1280
    max_failures: float = 0.1


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """The judge whose answers are the reward.

    Attributes:
      factory: address of the judge; a config whose `objective.rl` is none does not ask it.
      options: keyword arguments of the factory.
      rubric: folder of question files, or the number of a version that ships with the package: 1 or 2. Empty: 2.
      cache: file of the answers. Empty: WORKDIR/judgments.sqlite. An address (gs://...) or a folder/ is shared by
        processes.
      keep_clips: share of the judged clips, 0 to 1, that are kept in WORKDIR, to be judged again.
      controls: clips of the first judged step whose negative controls are judged, too: a still picture, text painted
        into the frames, and others to which the answer is no. A warning names those that pass. 0: none.
    """

    factory: str = ""
    options: Mapping[str, Any] = _options()
    rubric: str = ""
    cache: str = ""
    keep_clips: float = 0.0
    controls: int = 0


@dataclasses.dataclass(frozen=True)
class HeldOutSettings:
    """A judge that is asked at evaluation only, and never part of the reward.

    Attributes:
      factory: address of the judge. Empty: none.
      options: keyword arguments of the factory.
      rubric: folder of question files, or the number of a version that ships with the package: 1 or 2. Empty: 2.
    """

    factory: str = ""
    options: Mapping[str, Any] = _options()
    rubric: str = ""


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """What `evaluate` scores clips with.

    Attributes:
      factory: address of the benchmark. Empty: none.
      options: keyword arguments of the factory.
    """

    factory: str = ""
    options: Mapping[str, Any] = _options()
