"""World Model Self-Distillation of LTX-2 (2.0, 19B), the model of the paper's main result.

Commands:  world-distill convert MODEL weights/ltx2 --dtype bfloat16   (LTX-2's distilled model in diffusers' layout)
           world-distill annotate / encode --config ltx2 …            (see launch/README.md)
           world-distill train --config ltx2[:VARIANT] --config.data=data --workdir runs/ltx2
Hardware:  `world-distill plan --config ltx2 --config.mesh.tensor=4 --topology v5p:2x2x1` says what fits.
Result:    not measured yet; no chip has run it.

Variants, `--config ltx2:VARIANT`:
  wmsd      distillation with RL (AWM) from a VLM judge, which `launch/serve_judge.sh` starts; the default
  wmsd_grpo the same with Flow-GRPO by coefficient-preserving steps, noise in the last four steps alone
  distill   on-policy distillation (Eq. 11) alone: needs no judge
  dev       distill for the undistilled model: 30 steps of its own grid, a guided Demonstrator
  sft       supervised fine-tuning of the undistilled model on the clips of records, which `import-videos` or
            `demonstrate` made; the row LTX-2 + SFT of the paper
  debug     the same code on a tiny untrained network, in the sandbox's world: minutes on a CPU, no downloads
  debug_sft debug of sft

Public (WMSD, arXiv 2606.12072): the 8-step distilled sampler without guidance, LoRA, 24 rollouts a task, beta_d .01,
AWM, 100 training steps. Ours, since nothing is published: rank and targets of LoRA, tasks of a step, learning rate,
number of updates and draws, how times are drawn, fps, and the weights of the rewards.

Both streams are sampled, as the published pipelines do. `--config ltx2:VARIANT,audio=off` has the video stream alone:
another Demonstrator, in two thirds of the memory.

References are to be made with diffusers 0.39 or newer: before, the text connectors took tokens in another order. Its
pipelines are to be called with `use_cross_timestep=False`: their default is LTX-2.3's way to modulate the streams.
"""

import math

from ml_collections import ConfigDict

from world_distill.config import UserError, default_config, did_you_mean, load_config, parse_arg

VARIANTS = ("wmsd", "wmsd_grpo", "distill", "dev", "sft", "debug", "debug_sft")
# The published sampler of the distilled model.
TOKENS = 16 * 16 * 24  # of the picture: 121 frames of 512x768
TIMES = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
VAE = {
    "channels": 128, "encoder_widths": (256, 512, 1024, 2048), "encoder_blocks": (4, 6, 6, 2, 2),
    "steps": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"), "decoder_widths": (256, 512, 1024),
    "decoder_blocks": (5, 5, 5, 5), "patch": 4,
}  # fmt: skip


def dev_shift(tokens: int) -> float:
    """The undistilled model's shift of times: the more tokens a clip has, the larger."""
    return math.exp(0.95 + (tokens - 1024) * (2.05 - 0.95) / (4096 - 1024))


def dev_times(steps: int, tokens: int) -> tuple[float, ...]:
    """The undistilled model's grid, stretched to end at .1."""
    shift = dev_shift(tokens)
    shifted = [shift * t / (1 + (shift - 1) * t) for t in (1 - k * (1 - 1 / steps) / (steps - 1) for k in range(steps))]
    return tuple(round(1 - (1 - t) * (1 - 0.1) / (1 - shifted[-1]), 6) for t in shifted)


def get_config(arg: str = "") -> ConfigDict:
    """The config of a variant; see the module's text."""
    parsed = parse_arg(arg, variant="wmsd", audio="joint")
    variant = parsed.variant
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}; {did_you_mean(variant, VARIANTS)}")
    c = default_config("reproduce")
    # Sizes as published; see `world_distill.models.ltx2`.
    c.model = ConfigDict({
        "family": "ltx2", "size": (512, 768), "frames": 121, "fps": 24.0, "audio": parsed.audio, "audio_counts": False,
        "channels": 128, "width": 4096, "audio_channels": 128, "audio_width": 2048, "depth": 48, "heads": 32,
        "text_width": 3840, "time_width": 256, "dtype": "bfloat16", "int8": False, "vae_dtype": "bfloat16",
        "remat": "full", "attention": None, "places": 6144, "rows": None, "text_encoder": "", "text_projection": "",
        "stride": (8, 32, 32), "ranges": (20, 2048, 2048), "vae": VAE,
        "connectors": {"width": 3840, "heads": 30, "depth": 2, "registers": 128, "length": 1024, "states": 49},
    })  # fmt: skip
    c.text_length = 512

    # On accelerators one clip on each chip at a time.
    c.rollout.micro_batch = c.objective.micro_batch = None
    vlms = load_config("wan22_5b:wmsd")  # annotator, filters and judges do not depend on the model
    for section in ("annotator", "filters", "judge", "held_out", "benchmark"):
        c[section] = vlms[section].copy_and_resolve_references()
    c.annotator.options.seconds = 5.0  # model.frames / model.fps

    c.sampler.steps, c.sampler.shift, c.sampler.explicit = len(TIMES), 1.0, TIMES
    # The video stream alone: nothing judges the sound, and a loss without it would spoil it.
    c.executor.targets = r"blocks\.video\.(self_attention|cross_attention)\.(q|k|v|out)|blocks\.video\.mlp\.(up|down)"
    c.rollout.tasks, c.rollout.group = 8, 24
    c.steps = 100
    c.objective.times = "by_dt"
    if variant == "wmsd_grpo":
        c.objective.rl = "flow_grpo"
        c.objective.grpo_clip = 1e-4
        c.sampler.sde, c.sampler.eta, c.sampler.window = "cps", 0.8, (4, 4)
    if variant in ("distill", "dev"):
        c.objective.rl, c.judge.controls = "none", 0
        c.objective.beta_d = ((0, 1.0),)
    if variant in ("dev", "sft"):
        c.sampler.steps, c.sampler.explicit = 30, dev_times(30, TOKENS)
        c.objective.times = "index"
        c.demonstrator.guidance = 3.0
    if variant in ("debug", "debug_sft"):
        _shrink(c)
    if variant in ("sft", "debug_sft"):
        _fine_tune(c)
    c.reproduce.rows = _rows(tiny=variant in ("debug", "debug_sft"))
    return c


def _rows(tiny: bool) -> tuple[tuple[str, ...], ...]:
    """The rows of the paper's table. LTX-2 and LTX-2 + SFT are the undistilled model, whose weights have no default."""
    sft, distil, wmsd = ("debug_sft", "debug", "debug") if tiny else ("sft", "distill", "wmsd")
    no_rl, undistilled = (("objective.rl=none",), ()) if tiny else ((), ("base=",))
    return (
        ("base_undistilled", "base", sft, *undistilled),
        ("sft", "executor", sft, *undistilled),
        ("base", "base", wmsd),
        ("demonstrator", "demonstrator", wmsd),
        ("off_policy", "executor", distil, *no_rl, "rollout.role=demonstrator"),
        ("on_policy", "executor", distil, *no_rl),
        ("wmsd", "executor", wmsd),
    )


def _fine_tune(c: ConfigDict) -> None:
    """Takes the records' clips in place of rollouts, with times as the model's own trainer draws them."""
    c.objective.kind, c.objective.rl, c.objective.beta_d = "sft", "none", ((0, 0.0),)
    c.judge.controls = 0  # no judge is asked
    c.objective.sft_times, c.objective.times = "stretched", "index"
    c.objective.sft_shift = dev_shift(min(TOKENS, 4096))  # as there: no larger one for more tokens
    c.objective.updates, c.objective.minibatches, c.objective.draws = 1, 1, 1
    # A fine-tuned model is sampled with the base's own guidance; a distilled Executor has learnt to do without.
    c.rollout.guidance, c.demonstrator.guidance = c.demonstrator.guidance, 1.0


def _shrink(c: ConfigDict) -> None:
    """Makes everything tiny, and puts the sandbox's world in the place of pictures and VLMs."""
    small = load_config("wan22_5b:debug")
    for section in ("world", "scenes", "annotator", "filters", "judge", "held_out", "benchmark", "optimizer"):
        if section in small:
            c[section] = small[section]
    for key in ("base", "text_length", "encode_batch", "save_every", "evaluate_tasks", "steps"):
        c[key] = small[key]
    c.model.size, c.model.frames, c.model.fps = (96, 96), 9, 8.0
    c.model.channels = c.model.vae.channels = 6
    c.model.width, c.model.audio_width, c.model.audio_channels = 32, 16, 4
    c.model.depth, c.model.heads, c.model.text_width = 2, 2, 24
    c.model.vae.encoder_widths, c.model.vae.encoder_blocks = (8, 8, 16, 16), (1, 1, 1, 1, 1)
    c.model.vae.decoder_widths, c.model.vae.decoder_blocks = (8, 16, 32), (1, 1, 1, 1)
    c.model.connectors = ConfigDict({
        "width": 24, "heads": 2, "depth": 2, "registers": 4, "length": 1024, "states": 3
    })  # fmt: skip
    c.model.dtype = c.model.vae_dtype = "float32"
    c.model.text_encoder = "words"  # states without weights
    c.executor.rank, c.executor.alpha = 4, 4.0
    c.rollout.tasks, c.rollout.group = 4, 2
