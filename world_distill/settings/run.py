"""Settings of a run as a whole: the keys at the top level of a config, and how devices share the work."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """Keys at the top level of a config.

    Attributes:
      seed: seed of scenes, tasks, rollouts and training.
      base: weights of the base model: a checkpoint of `convert`, a weight file of `pretrain`, the name of weights that
        ship with the family, or "random" for untrained weights.
      text_length: tokens that texts are padded to.
      encode_batch: scenes, and texts, that `encode` takes at once.
      host_devices: CPU devices that batches are split over where there is no accelerator.
      data: folder of the encoded records (train, validation, test). Empty: WORKDIR/data.
      train_set: record set of that folder to learn from; `probe --keep` writes others.
      steps: training steps. A step is one batch of rollouts and its optimiser updates. The paper makes 100.
      log_every: training steps between progress lines.
      save_every: training steps between checkpoints.
      keep: checkpoints that are kept.
      checkpoints: folder or bucket (gs://...) of the checkpoints. Empty: WORKDIR/checkpoints.
      evaluate_every: training steps between evaluations on validation tasks; 0: never.
      evaluate_tasks: validation tasks that are looked at each time.
      evaluate_batch: clips sampled at once, over all devices.
    """

    seed: int = 0
    base: str = ""
    text_length: int = 512
    encode_batch: int = 4
    host_devices: int = 1
    data: str = ""
    train_set: str = "train"
    steps: int = 100
    log_every: int = 1
    save_every: int = 10
    keep: int = 2
    checkpoints: str = ""
    evaluate_every: int = 0
    evaluate_tasks: int = 64
    evaluate_batch: int = 8


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis of the mesh. One axis may be -1, which takes the devices that are left.

    Attributes:
      data: devices along the batch rows.
      fsdp: devices along weights and batch rows.
      context: devices along the tokens of one clip.
      tensor: devices along heads and hidden widths.
    """

    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class AblationSettings:
    """What `ablate` trains and compares.

    Attributes:
      reference: variant whose compute every other variant gets.
      variants: variants to train.
      orderings: claims, each as (above, below, metric, text): names of variants or of the roles base and demonstrator.
    """

    reference: str = "wmsd"
    variants: tuple[str, ...] = ()
    orderings: tuple[tuple[str, str, str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class ReproduceSettings:
    """The rows of the paper's table that `reproduce` fills.

    Attributes:
      reference: row whose compute every other trained row gets, and whose Demonstrator makes the clips of fine-tuning.
      rows: each as (name, role, variant, KEY=VALUE, ...): the role base, demonstrator or executor, whose clips are
        scored; the variant of this config that it has; and what differs from that variant.
    """

    reference: str = "wmsd"
    rows: tuple[tuple[str, ...], ...] = ()
