"""World Model Self-Distillation of Wan2.2-TI2V-5B.

Commands:  world-distill convert Wan2.2-TI2V-5B-Diffusers weights/wan22-5b --dtype bfloat16
           world-distill annotate / encode --config wan22_5b …      (see launch/README.md)
           world-distill train --config wan22_5b[:VARIANT] --config.data=data --workdir runs/wan
Hardware:  not measured yet. By their shapes the weights are 10.0 GB in bfloat16, the autoencoder 2.8 GB in float32.
Result:    not measured yet.

Variants, `--config wan22_5b:VARIANT`:
  official  the recipe of the published model, for `world-distill generate --recipe`: 704x1280, 121 frames, 50 steps
  distill   on-policy distillation (Eq. 11): needs no judge; the default
  wmsd      distillation with RL (AWM) from a VLM judge, which `launch/serve_judge.sh` starts
  sft       supervised fine-tuning on the clips of records, which `import-videos` or `demonstrate` made
  debug     the same code on a tiny untrained network, in the sandbox's world: minutes on a CPU, no downloads
  debug_sft debug of sft
  mid       the same with blocks large enough that matrix products take the time: for `world-distill benchmark`
"""

from ml_collections import ConfigDict

from world_distill.config import UserError, default_config, did_you_mean, parse_arg

VARIANTS = ("distill", "wmsd", "sft", "official", "debug", "debug_sft", "mid")
# The negative prompt of the published model's configuration (sample_neg_prompt). In English: garish colours,
# overexposed, static, blurred details, subtitles, style, works, paintings, picture, still, greyish, worst quality, low
# quality, JPEG residue, ugly, incomplete, extra fingers, badly drawn hands and faces, deformed, disfigured, misshapen
# limbs, fused fingers, motionless picture, cluttered background, three legs, crowds behind, walking backwards.
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)


def get_config(arg: str = "") -> ConfigDict:
    """The config of a variant; see the module's text."""
    variant = parse_arg(arg, variant="distill").variant
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}; {did_you_mean(variant, VARIANTS)}")
    c = default_config("reproduce")
    # Sizes as published; see `world_distill.models.wan`.
    c.model = ConfigDict({
        "family": "wan", "size": (480, 832), "frames": 49, "fps": 24.0, "channels": 48, "width": 3072, "depth": 30,
        "heads": 24, "mlp": 14336, "text_width": 4096, "time_width": 256, "dtype": "bfloat16", "int8": False,
        "vae_dtype": "float32", "remat": "full", "attention": None, "piece": 2, "rows": None, "text_encoder": "",
        "vae": {
            "channels": 48, "encoder_width": 160, "decoder_width": 256, "multiples": (1, 2, 4, 4), "blocks": 2,
            "halve_time": (False, True, True), "patch": 2, "shortcuts": True,
        },
    })  # fmt: skip

    # On accelerators one clip on each chip at a time.
    c.rollout.micro_batch = c.objective.micro_batch = None

    servers = {"servers": ("http://localhost:8000/v1",), "model": "Qwen/Qwen3.5-27B", "api_key_env": ""}  # the paper's
    limits = {"extra": "", "requests_per_minute": 0.0, "tokens_per_minute": 0.0}
    c.annotator.factory = "world_distill.data:ServerAnnotator"
    c.annotator.options = ConfigDict({
        **servers, **limits, "prompt": "", "seconds": 2.0,  # model.frames / model.fps
        "max_side": 1024, "quality": 95, "max_tokens": 4096, "temperature": 0.7, "thinking": False, "concurrency": 32,
        "timeout": 300.0, "give_up_after": 1800.0, "tries": 5,
    })  # fmt: skip
    # Thresholds as they are common, not tuned.
    c.filters = ConfigDict({
        "broken": True, "min_side": 256, "min_mean": 20.0, "max_mean": 235.0, "min_spread": 10.0,
        "min_sharpness": 100.0, "near": 4,
    })  # fmt: skip

    # The published model's own guidance, shift and negative prompt.
    c.demonstrator.guidance, c.demonstrator.negative = 5.0, NEGATIVE
    c.sampler.shift = 5.0
    c.executor.targets = r"blocks\.(self_attention|cross_attention)\.(q|k|v|out)|blocks\.mlp\.(up|down)"
    if variant != "wmsd":
        c.objective.rl = "none"
        c.objective.beta_d = ((0, 1.0),)

    c.judge.factory = "world_distill.judges:ServerJudge"
    c.judge.options = ConfigDict({
        **servers, **limits, "frames": 16, "max_side": 448, "min_mass": 0.5, "concurrency": 64, "timeout": 120.0,
        "give_up_after": 900.0,
    })  # fmt: skip
    c.judge.keep_clips = 0.01
    if variant == "wmsd":
        c.judge.controls = 8  # 168 questions, once
    c.held_out.options = c.judge.options.copy_and_resolve_references()
    c.held_out.options.model = ""  # of another maker than the judge's, if possible
    # WorldTasks' three questions, in other words than the reward's.
    c.benchmark.factory = "world_distill.evaluation:WorldTasksBench"
    c.benchmark.options = ConfigDict({
        "judge": c.judge.factory, "rubric": "", **c.judge.options.to_dict(),
    })  # fmt: skip
    if variant == "official":
        # The size that the model was tuned for; users report that others look worse. Training takes 480x832 and 49
        # frames: a step decodes and judges a whole group of clips, and official ones have 5.4 times as many latents.
        c.model.size, c.model.frames, c.model.fps = (704, 1280), 121, 24.0
        c.sampler.steps = 50
    if variant in ("debug", "debug_sft", "mid"):
        _shrink(c)
    if variant in ("sft", "debug_sft"):
        _fine_tune(c)
    c.reproduce.rows = _rows(tiny=variant in ("debug", "debug_sft"))
    if variant == "mid":
        c.model.size = (192, 192)
        c.model.width, c.model.depth, c.model.heads, c.model.mlp = 768, 4, 6, 3072
        c.model.text_width, c.model.time_width = 256, 256
        c.model.remat = "dots"
        c.world.size = 192
    return c


def _rows(tiny: bool) -> tuple[tuple[str, ...], ...]:
    """The rows of the paper's table. The base is sampled as a fine-tuned model is, with its own guidance."""
    sft, distil, wmsd = ("debug_sft", "debug", "debug") if tiny else ("sft", "distill", "wmsd")
    no_rl = ("objective.rl=none",) if tiny else ()
    return (
        ("base", "base", sft),
        ("demonstrator", "demonstrator", wmsd),
        ("sft", "executor", sft),
        ("off_policy", "executor", distil, *no_rl, "rollout.role=demonstrator"),
        ("on_policy", "executor", distil, *no_rl),
        ("wmsd", "executor", wmsd),
    )


def _fine_tune(c: ConfigDict) -> None:
    """Takes the records' clips in place of rollouts, with uniform times that are shifted as the sampler's are."""
    c.objective.kind, c.objective.rl, c.objective.beta_d = "sft", "none", ((0, 0.0),)
    c.objective.sft_shift = c.sampler.shift
    c.objective.updates, c.objective.minibatches, c.objective.draws = 1, 1, 1
    # A fine-tuned model is sampled with the base's own guidance; a distilled Executor has learnt to do without.
    c.rollout.guidance, c.demonstrator.guidance = c.demonstrator.guidance, 1.0


def _shrink(c: ConfigDict) -> None:
    """Makes everything tiny, and puts the sandbox's world in the place of pictures and VLMs."""
    c.model.size = (96, 96)
    c.model.frames = 9
    c.model.fps = 8.0
    c.model.channels = c.model.vae.channels = 6
    c.model.width, c.model.depth, c.model.heads, c.model.mlp = 32, 2, 2, 48
    c.model.text_width, c.model.time_width = 20, 32
    c.model.vae.encoder_width, c.model.vae.decoder_width, c.model.vae.blocks = 4, 6, 1
    c.model.dtype = "float32"
    c.model.piece = 0
    c.model.text_encoder = "words"  # states without weights
    c.base = "random"
    c.text_length = 64
    c.encode_batch = 8
    c.executor.rank, c.executor.alpha = 4, 4.0
    c.optimizer.learning_rate = ((0, 1e-3),)
    c.sampler.steps = 4
    c.rollout.tasks, c.rollout.group = 4, 2
    c.objective.rl = "awm"
    c.steps, c.save_every, c.evaluate_tasks = 4, 2, 8

    c.world = ConfigDict({"size": 96, "frames": 9})
    c.scenes = default_config("scenes").scenes
    c.scenes.factory = "world_distill.sandbox:write_scenes"
    c.scenes.options = ConfigDict({"world": "@world"})
    c.scenes.train, c.scenes.validation, c.scenes.test = 6, 2, 4
    c.annotator.max_side, c.annotator.max_failures = 0, 0.0
    c.filters = default_config().filters
    for part, name in (("annotator", "make_oracle"), ("benchmark", "make_benchmark")):
        c[part].factory = f"world_distill.sandbox:{name}"
        c[part].options = ConfigDict({"world": "@world"})
    # The oracle could not tell what an untrained network's clips show; this judge can.
    c.judge.factory = "world_distill.judges:Brightness"
    c.judge.options = ConfigDict()
    c.held_out.options = ConfigDict()
