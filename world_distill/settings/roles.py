"""Settings of the Demonstrator, the Executor, and the sampler that both use."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DemonstratorSettings:
    """The frozen base, told the solution.

    Attributes:
      guidance: scale of classifier-free guidance; 1: none. Above 1, a velocity costs two forward passes.
      negative: text that guidance leads away from, `rollout.guidance` too. `encode` stores its states.
    """

    guidance: float = 1.0
    negative: str = ""


@dataclasses.dataclass(frozen=True)
class ExecutorSettings:
    r"""The base with trained weights, told the task.

    Attributes:
      rank: rank of the LoRA factors; 0 trains full differences from the base.
      alpha: LoRA's product is scaled by alpha / rank.
      targets: pattern of the paths of the layers that LoRA adapts.
      differences: pattern of the paths of weights that get full differences beside LoRA, such as
        `blocks\..*\.bias`, which speed LoRAs change. Empty: none.
      start: LoRA of diffusers, ComfyUI or PEFT to start from; only for published families. Empty: none.
      start_without: parts of that file to leave out: biases, norms, modulation, weights, text-encoder, image-branch,
        audio, text-connectors.
      start_alpha: alpha of that file, where it does not say it; 0: what the file says, or its rank.
    """

    rank: int = 32
    alpha: float = 32.0
    targets: str = r"blocks\..*"
    differences: str = ""
    start: str = ""
    start_without: tuple[str, ...] = ()
    start_alpha: float = 0.0


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """The sampler of rollouts and evaluation. Times fall from 1 (noise) to 0 (a clean clip).

    Attributes:
      steps: sampler steps of a rollout.
      shift: shift of the uniform grid of times: t -> shift t / (1 + (shift - 1) t).
      explicit: times in place of the shifted grid, noisiest first. Empty: the grid.
      eta: noise of the SDE steps; 0 samples the ODE. Flow-GRPO needs noise: its authors take 0.7, and 0.8 with `cps`,
        where 1 is the most.
      sde: stochastic step: "flow_grpo" (std eta sqrt(t / (1 - t)) sqrt(t - t_next), for short steps) or "cps" (std
        t_next sin(eta pi / 2), eta at most 1), which lands on the noise level t_next on any grid. The unit of a
        log-probability differs (`core.sampling`): `cps` is used with an `objective.grpo_clip` of 1e-5 to 1e-4.
      window: (start, length) of the steps that stay stochastic, counted from 0; (4, 4) are the last four of eight. The
        step into 0 has no noise. Empty: all steps.
    """

    steps: int = 12
    shift: float = 5.0
    explicit: tuple[float, ...] = ()
    eta: float = 0.0
    sde: str = "flow_grpo"
    window: tuple[int, ...] = ()
