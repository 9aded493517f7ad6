"""Settings of pretraining the sandbox's base model."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class PretrainSettings:
    """Flow matching on captioned clips: loss t^loss_power |velocity error|^2.

    Attributes:
      start: weights to start from, named as in `base`. Empty: random weights.
      fresh: pattern of the whole names of weights that begin anew in spite of `start`. Empty: none.
      steps: optimiser updates.
      batch: clips an update.
      optimizer: adam, adamw or muon.
      learning_rate: first learning rate; falls to 0 along half a cosine.
      warmup: updates in which the learning rate rises from 0.
      grad_clip: limit of the gradient's global norm.
      loss_power: exponent of t in the loss; 2 weighs errors of the clean latents alike at all times.
      drop_text: share of clips whose caption is replaced by the empty text.
      shift: shift of the random times. Patches of pixels need much noise to be hidden.
      plain_every: one clip in so many has an unshifted time.
      ema_decay: decay, per update, of the average of the weights that is kept.
      log_every: updates between lines of the log.
      save_every: updates between checkpoints.
    """

    start: str = ""
    fresh: str = ""
    steps: int = 18_000
    batch: int = 32
    optimizer: str = "muon"
    learning_rate: float = 0.01
    warmup: int = 100
    grad_clip: float = 1.0
    loss_power: float = 1.0
    drop_text: float = 0.1
    shift: float = 4.0
    plain_every: int = 8
    ema_decay: float = 0.999
    log_every: int = 100
    save_every: int = 500
