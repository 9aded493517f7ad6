"""World Model Self-Distillation of Wan2.2-TI2V-5B.

Commands:  world-distill convert Wan2.2-TI2V-5B-Diffusers weights/wan22-5b --dtype bfloat16
           world-distill annotate / encode --config wan22_5b …      (see README.md)
           world-distill train --config wan22_5b[:VARIANT] --config.data=data --workdir runs/wan
Hardware:  not measured yet. By their shapes the weights are 10.0 GB in bfloat16, the autoencoder 2.8 GB in float32.
Result:    not measured yet.

Variants, `--config wan22_5b:VARIANT`:
  distill   on-policy distillation (Eq. 11): needs no judge; the default
  wmsd      distillation with RL (AWM) from a VLM judge, which `launch/serve_judge.sh` starts
  debug     the same code on a tiny untrained network, in the sandbox's world: minutes on a CPU, no downloads
  mid       the same with blocks large enough that matrix products take the time: for `world-distill benchmark`
"""

from ml_collections import ConfigDict

from world_distill.config import UserError, parse_arg

VARIANTS = ("distill", "wmsd", "debug", "mid")
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
        raise UserError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    c = ConfigDict()
    c.seed = 0  # of tasks, rollouts and training

    # Model: sizes as published --------------------------------------------------------------------------------------
    c.model = ConfigDict()
    c.model.family = "wan"
    c.model.size = (480, 832)  # height and width of a clip in pixels, multiples of 32
    c.model.frames = 49  # of a clip: 1 + a multiple of 4
    c.model.fps = 24.0  # frames a second
    c.model.channels = 48  # of latents
    c.model.width = 3072  # hidden width
    c.model.depth = 30  # blocks
    c.model.heads = 24  # attention heads
    c.model.mlp = 14336  # hidden width of the MLP
    c.model.text_width = 4096  # of the text encoder's states
    c.model.time_width = 256  # features of a timestep
    c.model.vae = ConfigDict()
    c.model.vae.channels = 48  # of latents
    c.model.vae.encoder_width = 160  # channels at the highest resolution
    c.model.vae.decoder_width = 256
    c.model.vae.multiples = (1, 2, 4, 4)  # of these, by resolution
    c.model.vae.blocks = 2  # residual blocks a resolution
    c.model.vae.halve_time = (False, True, True)  # steps down in resolution that halve the frame rate
    c.model.vae.patch = 2  # pixels folded into channels
    c.model.vae.shortcuts = True  # averages and repeats around each resolution
    c.model.dtype = "bfloat16"  # of the transformer's weights
    c.model.vae_dtype = "float32"  # of the autoencoder's
    c.model.remat = "full"  # what the backward pass computes again: none | dots | attention | full | offload
    c.model.attention = None  # none (by platform) | blocked | splash | cudnn | xla
    c.model.piece = 2  # latent frames decoded at a time; 0: all
    c.model.rows = 0  # clips decoded at a time, over all devices; 0: all
    c.model.text_encoder = ""  # for `encode` and `generate`: folder with text_encoder/ and tokenizer/
    c.base = ""  # checkpoint of `world-distill convert`; "random": untrained
    c.text_length = 512  # tokens that texts are padded to, as the model was trained
    c.encode_batch = 4  # scenes, and texts, that `encode` takes at once
    c.host_devices = 1  # CPU devices to split batches over, where there is no accelerator

    c.mesh = ConfigDict()
    c.mesh.data = 1  # batch rows
    c.mesh.fsdp = -1  # weights and rows; -1 takes the devices that are left
    c.mesh.context = 1  # tokens of one clip
    c.mesh.tensor = 1  # heads and hidden widths

    # Scenes, tasks and solutions ------------------------------------------------------------------------------------
    c.annotator = ConfigDict()
    c.annotator.factory = "world_distill.data.vlm_annotator:ServerAnnotator"  # package.module:function
    c.annotator.options = ConfigDict()
    c.annotator.options.servers = ("http://localhost:8000/v1",)  # OpenAI-compatible, all with the same model
    c.annotator.options.model = "Qwen/Qwen3.5-27B"  # as they call it (paper's)
    c.annotator.options.api_key_env = ""  # environment variable with the API key; empty: none is sent
    c.annotator.options.prompt = ""  # folder of the texts that ask; empty: those that ship with the package
    c.annotator.options.seconds = 2.0  # in which a task has to be done: model.frames / model.fps
    c.annotator.options.max_side = 1024  # pixels; larger pictures are shrunk
    c.annotator.options.quality = 95  # of the pictures' JPEG; 0: PNG
    c.annotator.options.max_tokens = 4096  # of an answer: about 250 a pair, and the thoughts
    c.annotator.options.temperature = 0.7  # of sampling
    c.annotator.options.thinking = False  # may the model think first? Then with four times the tokens
    c.annotator.options.extra = ""  # more fields of each request, as JSON
    c.annotator.options.concurrency = 32  # requests under way at once
    c.annotator.options.requests_per_minute = 0.0  # 0: no limit
    c.annotator.options.tokens_per_minute = 0.0  # of requests and answers; 0: no limit
    c.annotator.options.timeout = 300.0  # seconds of one attempt
    c.annotator.options.give_up_after = 1800.0  # seconds without an answer, after which a picture is left out
    c.annotator.options.tries = 5  # failures of one picture while others are answered
    c.annotator.pairs = 8  # tasks a scene, at most (paper: 8)
    c.annotator.test_pairs = 1  # tasks a scene in validation and test
    c.annotator.max_side = 1280  # pixels that the longer side of an image is shrunk to; 0: as it is
    c.annotator.max_failures = 0.1  # share of the images that it may fail on

    c.filters = ConfigDict()  # which images are asked about; thresholds as they are common, not tuned
    c.filters.broken = True  # leave out images that cannot be read, instead of stopping
    c.filters.min_side = 256  # pixels of the shorter side, at least
    c.filters.min_mean = 20.0  # luminance (0 to 255), at least: darker is night
    c.filters.max_mean = 235.0  # at most: brighter is glare
    c.filters.min_spread = 10.0  # standard deviation of luminance, at least: less is fog, a wall, a loading screen
    c.filters.min_sharpness = 100.0  # variance of the Laplacian at 512 pixels, at least: less is blur
    c.filters.near = 4  # bits of 64 that hashes of near-duplicates differ in, at most; -1: none is sought

    # Demonstrator ---------------------------------------------------------------------------------------------------
    c.demonstrator = ConfigDict()
    c.demonstrator.guidance = 5.0  # scale of classifier-free guidance, the model's own; 1: none (and `negative` empty)
    c.demonstrator.negative = NEGATIVE  # text that guidance leads away from, rollout.guidance too; `encode` reads it

    # Executor -------------------------------------------------------------------------------------------------------
    c.executor = ConfigDict()
    c.executor.rank = 32  # of the LoRA factors; 0 trains full differences from the base
    c.executor.alpha = 32.0  # LoRA's product is scaled by alpha / rank
    c.executor.targets = (
        r"blocks\.(self_attention|cross_attention)\.(q|k|v|out)|blocks\.mlp\.(up|down)"  # layers, by path
    )
    c.executor.start = ""  # LoRA file (diffusers' or ComfyUI's layout) to start from

    c.sampler = ConfigDict()
    c.sampler.steps = 12  # of a rollout
    c.sampler.shift = 5.0  # of the uniform grid of times, the model's own
    c.sampler.explicit = ()  # times instead of a shifted grid, noisiest first
    c.sampler.eta = 0.0  # noise of the SDE steps (Flow-GRPO: 0.7); 0 samples the ODE
    c.sampler.window = ()  # (start, length) of the steps that stay stochastic; empty: all but the last

    # Experience -----------------------------------------------------------------------------------------------------
    c.rollout = ConfigDict()
    c.rollout.tasks = 8  # tasks a step
    c.rollout.group = 8  # rollouts a task (paper: 24)
    c.rollout.spread = True  # a task for every rollout while there is no RL, which alone needs groups
    c.rollout.role = "executor"  # or demonstrator: off-policy distillation
    c.rollout.micro_batch = 0  # rollouts on their way at once, over all devices; 0: all of a step
    c.rollout.guidance = 1.0  # scale of guidance of the Executor's clips; 1: none, which training makes good
    c.rollout.staleness = 0  # 1: roll the next step's clips while these are judged, an update behind
    c.rollout.weights = ConfigDict()
    c.rollout.weights.task = 1.0  # lambda_task: was it done
    c.rollout.weights.agent = 1.0  # lambda_agent: by the one who was to do it
    c.rollout.weights.consistency = 1.0  # lambda_cons: physically and temporally consistent
    c.rollout.weights.distill = 0.0  # lambda_distill: Eq. 9
    c.rollout.distill_min_time = 0.0  # Eq. 9 is integrated over t from here to 1; 0: all of it, as in the paper
    c.rollout.clip = 0.0  # log-odds are clipped to +-clip; 0: not
    c.rollout.normalise = "batch"  # divide each reward by its std over the batch | group | none
    c.rollout.std = "batch"  # std that advantages are divided by: batch | group | none
    c.rollout.std_floor = 0.0  # least std that is divided by, in the unit of the weighted rewards
    c.rollout.min_valid = 2  # valid judgments that a group needs
    c.rollout.max_invalid = 0.5  # share of a step's clips without a judgment above which the run stops
    c.rollout.negative_scale = 1.0  # factor on negative advantages

    # Objective ------------------------------------------------------------------------------------------------------
    c.objective = ConfigDict()
    c.objective.rl = "awm" if variant == "wmsd" else "none"  # awm | nft | flow_grpo | none
    c.objective.rl_weight = ((0, 1.0),)  # of the RL loss, by step: (step, value) points
    c.objective.beta_d = ((0, 0.01 if variant == "wmsd" else 1.0),)  # of the Demonstrator's anchor (paper's best: .01)
    c.objective.anchor_states = "visited"  # visited | renoised
    c.objective.anchor_loss = "mse"  # mse | decoupled
    c.objective.updates = 4  # optimiser updates on one batch of rollouts
    c.objective.minibatches = 4  # parts of the rollouts, one an update
    c.objective.draws = 2  # random times an update, for each row
    c.objective.tied = 1  # neighbouring rows that share their times; 0: all
    c.objective.micro_batch = 0  # rows a forward; 0: all
    c.objective.skip_first = True  # leave pure noise out of the times of re-noised clips
    c.objective.keep_fraction = 1.0  # part of the grid that these times come from (14 steps: 0.9)
    c.objective.awm_weighting = "uniform"  # uniform | t | t2 | huber | ghuber
    c.objective.awm_power = 0.25  # of ghuber
    c.objective.awm_clip = 0.2  # clip range of the ratio
    c.objective.awm_ratio_temperature = 0.005  # divides the log-ratio, so that the clip engages
    c.objective.awm_old = "start"  # ratio's denominator: current | start | ema
    c.objective.nft_beta = 1.0  # how far DiffusionNFT's implicit policies lie from the old one
    c.objective.nft_old = "start"  # DiffusionNFT's old policy: start | ema
    c.objective.beta_old = 0.0  # trust region: distance to a fast average of the Executor (AWM: 1)
    c.objective.old_slope = 0.001  # that average's decay grows by this a step
    c.objective.old_maximum = 0.3  # up to this
    c.objective.beta_base = 0.0  # distance to the base given the task
    c.objective.grpo_clip = 1e-3  # Flow-GRPO's clip range
    c.objective.grpo_beta = 0.0  # Flow-GRPO's exact KL to the base given the task
    c.objective.ema_decay = 0.98  # per update, of the weights that are evaluated

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adam | adamw | muon
    c.optimizer.learning_rate = ((0, 1e-4),)  # by step
    c.optimizer.weight_decay = 0.0
    c.optimizer.grad_clip = 1.0  # global norm
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8

    # Judge and benchmark --------------------------------------------------------------------------------------------
    c.judge = ConfigDict()
    c.judge.factory = "world_distill.judges.server:ServerJudge"  # package.module:function; `distill` does not ask it
    c.judge.options = ConfigDict()
    c.judge.options.servers = ("http://localhost:8000/v1",)  # OpenAI-compatible, all with the same model
    c.judge.options.model = "Qwen/Qwen3.5-27B"  # as they call it
    c.judge.options.api_key_env = ""  # environment variable with the API key; empty: none is sent
    c.judge.options.frames = 16  # of a clip that the judge sees, evenly over time
    c.judge.options.max_side = 448  # pixels; larger frames are shrunk
    c.judge.options.min_mass = 0.5  # probability that yes and no together need for an answer to count
    c.judge.options.extra = ""  # more fields of each request, as JSON
    c.judge.options.concurrency = 64  # requests under way at once
    c.judge.options.requests_per_minute = 0.0  # 0: no limit
    c.judge.options.tokens_per_minute = 0.0  # of requests and answers; 0: no limit
    c.judge.options.timeout = 120.0  # seconds of one attempt
    c.judge.options.give_up_after = 900.0  # seconds without an answer, after which a clip is left out
    c.judge.rubric = ""  # folder of question files; empty: those that ship with the package
    c.judge.cache = ""  # file of answers; empty: WORKDIR/judgments.sqlite; gs://… or a folder/: shared by hosts
    c.judge.keep_clips = 0.01  # share of judged clips kept in WORKDIR, to be judged again (`judgments --rejudge`)
    c.held_out = ConfigDict()
    c.held_out.factory = ""  # a judge asked at evaluation only, never part of the reward; empty: none
    c.held_out.options = c.judge.options.copy_and_resolve_references()
    c.held_out.options.model = ""  # of another maker than the judge's, if possible
    c.held_out.rubric = ""  # like judge.rubric
    c.benchmark = ConfigDict()
    c.benchmark.factory = ""  # package.module:function; `evaluate` asks it
    c.benchmark.options = ConfigDict()

    # The run --------------------------------------------------------------------------------------------------------
    c.data = ""  # folder of encoded records (train, validation, test); empty: WORKDIR/data
    c.train_set = "train"  # record set of that folder to learn from; `probe --keep` writes others
    c.steps = 100  # training steps (paper: 100)
    c.log_every = 1  # steps
    c.save_every = 10  # steps
    c.keep = 2  # checkpoints
    c.checkpoints = ""  # their folder or bucket (gs://); empty: WORKDIR/checkpoints
    c.evaluate_every = 0  # steps; 0: never
    c.evaluate_tasks = 64  # validation tasks looked at each time
    c.evaluate_batch = 8  # clips sampled at once
    if variant in ("debug", "mid"):
        _shrink(c)
    if variant == "mid":
        c.model.size = (192, 192)
        c.model.width, c.model.depth, c.model.heads, c.model.mlp = 768, 4, 6, 3072
        c.model.text_width, c.model.time_width = 256, 256
        c.model.remat = "dots"
        c.world.size = 192
    return c


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

    c.world = ConfigDict()
    c.world.size = 96  # pixels a side
    c.world.frames = 9  # of a clip, the scene included
    c.scenes = ConfigDict()
    c.scenes.factory = "world_distill.sandbox.scenes:write_scenes"
    c.scenes.options = ConfigDict({"world": "@world"})
    c.scenes.train, c.scenes.validation, c.scenes.test = 6, 2, 4  # scene images
    c.annotator.max_side, c.annotator.max_failures = 0, 0.0
    c.filters = ConfigDict({
        "broken": False, "min_side": 0, "min_mean": 0.0, "max_mean": 255.0, "min_spread": 0.0, "min_sharpness": 0.0,
        "near": -1,
    })  # fmt: skip
    for part, name in (("annotator", "oracle"), ("benchmark", "benchmark")):
        c[part].factory = f"world_distill.sandbox.factories:{name}"
        c[part].options = ConfigDict({"world": "@world"})
    # The oracle could not tell what an untrained network's clips show; this judge can.
    c.judge.factory = "world_distill.judges.brightness:Brightness"
    c.judge.options = ConfigDict()
    c.held_out.options = ConfigDict()
