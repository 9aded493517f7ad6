r"""World Model Self-Distillation in the sandbox world: the whole method on a laptop CPU.

Command:   world-distill quickstart                     (this config, from nothing to the report)
           world-distill train --config sandbox[:VARIANT] --workdir DIR
           world-distill ablate                         (all variants, over several seeds)
Hardware:  2 CPU cores, no accelerator, no network.

Variants, `--config sandbox:VARIANT`:
  wmsd              on-policy distillation first, then RL (AWM) with the Demonstrator as anchor; the default
  wmsd_grpo         the same with Flow-GRPO
  wmsd_no_consistency   the same without the consistency reward
  wmsd_nft          the same with DiffusionNFT
  beta_X            the same with anchor weight X during RL (beta_0: RL after distillation, without an anchor)
  on_policy         on-policy distillation alone (Eq. 11)
  on_policy_reward  on-policy distillation, then with the distillation reward (Eq. 9) as RL's only reward
  judge_free        the same with Eq. 9 integrated over high noise alone; no judge is asked
  off_policy        distillation on the Demonstrator's own rollouts (Eq. 3)
  rl_only           RL from the start, no Demonstrator
  full_weights      wmsd with full differences from the base in place of LoRA
  wmsd_guided, on_policy_guided   the same with a guided Demonstrator (`demonstrator.guidance` 2)
  full_kinds        wmsd on all kinds of task, as `--config sandbox:wmsd,kinds=full`

Guidance leads away from the empty text, whose states `quickstart`, `ablate` and `encode` keep beside the records; the
base has to know that text. Any variant but rl_only takes --config.demonstrator.guidance=2.

The base that ships was pretrained in two stages. models/tiny/base_1.jsonl and base_2.jsonl are their logs, and the
metadata of models/tiny/base_2.safetensors names both commands.
  1  18,000 updates of 32 clips with loss_power 0, drop_text 0, two_legs 0.25 and faults blink 0.08, jump 0.07, vanish
     0.05, by a network without add_scene. Its weights ship, too, as "1".
  2  world-distill pretrain --config sandbox --seed 10 --config.host_devices=1 --config.pretrain.steps=4900
     --config.pretrain.start=1 --config.pretrain.fresh='head\..*' --config.pretrain.learning_rate=0.006 --workdir stage2
     GLIBC_TUNABLES=glibc.malloc.hugetlb=1 saves its page faults, on Linux.
A base from nothing by this config alone (18,000 updates): not measured yet.
"""

from ml_collections import ConfigDict

from world_distill.config import UserError, parse_arg

KINDS = {"simple": ("go", "beside"), "full": ("go", "beside", "push", "sequence")}
VARIANTS = (
    "wmsd", "wmsd_grpo", "wmsd_nft", "wmsd_no_consistency", "on_policy", "on_policy_reward", "judge_free", "off_policy",
    "rl_only", "wmsd_guided", "on_policy_guided", "full_weights", "full_kinds",
)  # fmt: skip
BETAS = ("beta_0", "beta_0.001", "beta_0.1", "beta_1")  # around the anchor weight of `wmsd`
ANCHOR = 0.01  # weight of the anchor: the paper's best
REWARD_ANCHOR = 0.05  # ... where Eq. 9 is the only reward
GUIDANCE = 2.0  # scale of the guided variants' Demonstrator
HIGH_NOISE = 0.8  # lower bound of Eq. 9's integral: the first three of the sampler's six steps
DISTILL_STEPS = 50  # of the steps, at the start, are distillation alone
GUIDED_DISTILL_STEPS = 42  # ... with a guided Demonstrator, whose velocities cost two forwards
STEPS = 62  # in all
DISTILL_RATE, RL_RATE, LAST_RATE = 4e-3, 1e-3, 1e-4  # learning rates: at first, of RL, at the end


def get_config(arg: str = "") -> ConfigDict:
    """The config of a variant; see the module's text."""
    a = parse_arg(arg, variant="wmsd", kinds="simple")
    c = ConfigDict()
    c.seed = 0  # of scenes, tasks, rollouts and training

    # The world ------------------------------------------------------------------------------------------------------
    c.world = ConfigDict()
    c.world.cells = 5  # lattice places a side
    c.world.size = 30  # pixels a side
    c.world.frames = 9  # of a clip, the scene included
    c.world.agents = (2, 2)  # fewest and most in a scene
    c.world.rings = (2, 2)  # fewest and most in a scene
    c.world.crate = 0.3  # share of scenes with a crate to push
    c.world.shapes = ("disc", "square", "diamond")  # of agents

    # What the base model is pretrained on ---------------------------------------------------------------------------
    c.clips = ConfigDict()
    c.clips.factory = "world_distill.sandbox.factories:random_clips"
    c.clips.options = ConfigDict()
    c.clips.options.world = "@world"  # the section above
    c.clips.options.styles = (0.3, 0.4, 0.3)  # shares of captions in steps, by landmark, with both
    c.clips.options.two_legs = 0.5  # share that turn once, of the motions without a push
    c.clips.options.faults = ConfigDict()
    c.clips.options.faults.short = 0.4  # share of clips that stop short of what the caption says
    c.clips.options.faults.short_travel = (0.5, 0.5)  # share of the way that those make
    c.clips.options.faults.other = 0.08  # share where another agent moves
    c.clips.options.faults.blink = 0.03  # share where a thing is gone for a frame or two
    c.clips.options.faults.jump = 0.04  # share where the agent jumps to its end
    c.clips.options.faults.vanish = 0.02  # share where a thing fades away

    c.pretrain = ConfigDict()
    c.pretrain.start = ""  # weights to start from, named as in `base`; empty: random weights
    c.pretrain.fresh = ""  # weights that begin anew in spite of `start`: a pattern of their whole names; empty: none
    c.pretrain.steps = 18_000  # updates
    c.pretrain.batch = 32  # clips an update
    c.pretrain.optimizer = "muon"  # adam | adamw | muon
    c.pretrain.learning_rate = 0.01  # half cosine to 0
    c.pretrain.warmup = 100  # updates
    c.pretrain.grad_clip = 1.0  # global norm
    c.pretrain.loss_power = 1.0  # the loss is t^power |velocity error|^2; 2 weighs errors of clean latents alike
    c.pretrain.drop_text = 0.1  # share of clips whose caption is replaced by the empty text
    c.pretrain.shift = 4.0  # of the times; patches of pixels need much noise to be hidden
    c.pretrain.plain_every = 8  # one clip in so many has an unshifted time
    c.pretrain.ema_decay = 0.999  # of the weights that are kept
    c.pretrain.log_every = 100  # updates
    c.pretrain.save_every = 500  # updates

    # Model ----------------------------------------------------------------------------------------------------------
    c.model = ConfigDict()
    c.model.family = "tiny"
    c.model.size = 30  # pixels a side, as the world's
    c.model.frames = 9  # as the world's
    c.model.patch = 6  # pixels a latent cell is wide and high
    c.model.stride = 4  # frames in a latent frame
    c.model.width = 96  # hidden width
    c.model.depth = 4  # blocks
    c.model.heads = 3  # attention heads
    c.model.mlp = 3  # MLP width / hidden width
    c.model.text_width = 64  # of the frozen text encoder's states
    c.model.add_scene = True  # the head gives the change to the scene's frame
    c.model.remat = False  # recompute activations in the backward pass
    c.model.unroll = 4  # blocks a turn of the layer scan (all: a quarter faster on a CPU)
    c.model.merge_lora = True  # add LoRA's product to the weights first: for small layers the faster way
    c.base = ""  # weights of the base model; empty: those that ship with the package; "1": the first that did
    c.encode_batch = 64  # scenes, and texts, that `encode` takes at once
    c.text_length = 40  # tokens that texts are padded to
    c.host_devices = 2  # CPU devices to split batches over

    c.mesh = ConfigDict()
    c.mesh.data = -1  # batch rows; -1 takes the devices that are left
    c.mesh.fsdp = 1  # weights and rows
    c.mesh.context = 1  # tokens of one clip
    c.mesh.tensor = 1  # heads and hidden widths

    # Scenes, tasks and solutions ------------------------------------------------------------------------------------
    c.scenes = ConfigDict()
    c.scenes.factory = "world_distill.sandbox.scenes:write_scenes"
    c.scenes.options = ConfigDict()
    c.scenes.options.world = "@world"
    c.scenes.train = 400  # scene images to learn from
    c.scenes.validation = 64  # to look at while training and tuning
    c.scenes.test = 256  # for the final table only
    c.annotator = ConfigDict()
    c.annotator.factory = "world_distill.sandbox.factories:oracle"
    c.annotator.options = ConfigDict()
    c.annotator.options.world = "@world"
    c.annotator.options.kinds = KINDS[a.kinds]  # of task
    c.annotator.pairs = 8  # tasks a scene, at most (paper: 8)
    c.annotator.test_pairs = 2  # tasks a scene in validation and test
    c.annotator.max_side = 0  # pixels that the longer side of an image is shrunk to; 0: as it is
    c.annotator.max_failures = 0.0  # share of the images that it may fail on

    c.filters = ConfigDict()  # which images are asked about: all
    c.filters.broken = False  # leave out images that cannot be read, instead of stopping
    c.filters.min_side = 0  # pixels of the shorter side, at least
    c.filters.min_mean = 0.0  # luminance (0 to 255), at least
    c.filters.max_mean = 255.0  # at most
    c.filters.min_spread = 0.0  # standard deviation of luminance, at least
    c.filters.min_sharpness = 0.0  # variance of the Laplacian at 512 pixels, at least
    c.filters.near = -1  # bits of 64 that hashes of near-duplicates differ in, at most; -1: none is sought

    # Demonstrator ---------------------------------------------------------------------------------------------------
    c.demonstrator = ConfigDict()
    c.demonstrator.guidance = 1.0  # scale of classifier-free guidance; 1: none; above: two forward passes a velocity
    c.demonstrator.negative = ""  # text that guidance leads away from, rollout.guidance too; `encode` reads it

    # Executor -------------------------------------------------------------------------------------------------------
    c.executor = ConfigDict()
    c.executor.rank = 16  # of the LoRA factors; 0 trains full differences from the base
    c.executor.alpha = 16.0  # LoRA's product is scaled by alpha / rank
    c.executor.targets = r"blocks\..*|text_in|text_out|pooled"  # layers that LoRA adapts, by their path
    c.executor.start = ""  # LoRA file to start from, for families that are published

    c.sampler = ConfigDict()
    c.sampler.steps = 6  # of a rollout
    c.sampler.shift = 3.0  # of the uniform grid of times
    c.sampler.explicit = ()  # times instead of a shifted grid, noisiest first
    c.sampler.eta = 0.0  # noise of the SDE steps (Flow-GRPO: 0.7); 0 samples the ODE
    c.sampler.window = ()  # (start, length) of the steps that stay stochastic; empty: all but the last

    # Experience -----------------------------------------------------------------------------------------------------
    c.rollout = ConfigDict()
    c.rollout.tasks = 16  # tasks a step
    c.rollout.group = 4  # rollouts a task (paper: 24)
    c.rollout.spread = True  # a task for every rollout while there is no RL, which alone needs groups
    c.rollout.role = "executor"  # or demonstrator: off-policy distillation
    c.rollout.micro_batch = 0  # rollouts on their way at once, over all devices; 0: all of a step
    c.rollout.guidance = 1.0  # scale of guidance of the Executor's clips, in training and evaluation; 1: none
    c.rollout.staleness = 0  # 1: roll the next step's clips while these are judged, an update behind
    c.rollout.weights = ConfigDict()
    c.rollout.weights.task = 1.0  # lambda_task: was it done
    c.rollout.weights.agent = 1.0  # lambda_agent: by the one who was to do it
    c.rollout.weights.consistency = 2.0  # lambda_cons: physically and temporally consistent
    c.rollout.weights.distill = 0.0  # lambda_distill: Eq. 9
    c.rollout.distill_min_time = 0.0  # Eq. 9 is integrated over t from here to 1; 0: all of it, as in the paper
    c.rollout.clip = 3.0  # log-odds are clipped to +-clip
    c.rollout.normalise = "none"  # divide each reward by its std over the batch | group | none
    c.rollout.std = "group"  # std that advantages are divided by: batch | group | none
    c.rollout.std_floor = 0.0  # least std that is divided by, in the unit of the weighted rewards
    c.rollout.min_valid = 2  # valid judgments that a group needs
    c.rollout.max_invalid = 0.5  # share of a step's clips without a judgment above which the run stops
    c.rollout.negative_scale = 1.0  # factor on negative advantages

    # Objective ------------------------------------------------------------------------------------------------------
    c.objective = ConfigDict()
    c.objective.rl = "awm"  # awm | nft | flow_grpo | none
    c.objective.rl_weight = _from_then_on(1.0)  # of the RL loss, by step: (step, value) points
    c.objective.beta_d = _anchor(ANCHOR)  # weight of the Demonstrator's anchor, by step
    c.objective.anchor_states = "visited"  # visited | renoised
    c.objective.anchor_loss = "mse"  # mse | decoupled
    c.objective.updates = 16  # optimiser updates on one batch of rollouts
    c.objective.minibatches = 4  # parts of the rollouts, one an update
    c.objective.draws = 1  # random times an update, for each row
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
    c.optimizer.name = "muon"  # adam | adamw | muon
    c.optimizer.learning_rate = _rates(DISTILL_RATE)  # by step
    c.optimizer.weight_decay = 0.0
    c.optimizer.grad_clip = 0.005  # global norm
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8

    # Judge and benchmark --------------------------------------------------------------------------------------------
    c.judge = ConfigDict()
    c.judge.factory = "world_distill.sandbox.factories:oracle"
    c.judge.options = ConfigDict()
    c.judge.options.world = "@world"
    c.judge.rubric = ""  # folder of question files; empty: those that ship with the package
    c.judge.cache = ""  # file of answers; empty: WORKDIR/judgments.sqlite; gs://… or a folder/: shared by hosts
    c.judge.keep_clips = 0.0  # share of judged clips kept in WORKDIR, to be judged again (`judgments --rejudge`)
    c.held_out = ConfigDict()
    c.held_out.factory = ""  # a judge asked at evaluation only, never part of the reward; empty: none
    c.held_out.options = ConfigDict()
    c.held_out.options.world = "@world"
    c.held_out.options.tolerance = ConfigDict()  # stricter than the judge's
    c.held_out.options.tolerance.reach = 0.3  # cells to the goal in the last frame
    c.held_out.options.tolerance.residual = 0.3  # difference from a clean drawing, in units of one thing
    c.held_out.options.tolerance.moved = 0.7  # cells that the named agent has to move
    c.held_out.rubric = ""  # like judge.rubric
    c.benchmark = ConfigDict()
    c.benchmark.factory = "world_distill.sandbox.factories:benchmark"
    c.benchmark.options = ConfigDict()
    c.benchmark.options.world = "@world"

    # The run --------------------------------------------------------------------------------------------------------
    c.data = ""  # folder of encoded records (train, validation, test); empty: WORKDIR/data
    c.train_set = "train"  # record set of that folder to learn from; `probe --keep` writes others
    c.steps = STEPS  # training steps
    c.log_every = 10  # steps
    c.save_every = 20  # steps
    c.keep = 2  # checkpoints
    c.checkpoints = ""  # their folder or bucket (gs://); empty: WORKDIR/checkpoints
    c.evaluate_every = 20  # steps; 0: never
    c.evaluate_tasks = 64  # validation tasks looked at each time
    c.evaluate_batch = 64  # clips sampled at once

    c.ablation = ConfigDict()
    c.ablation.reference = "wmsd"  # every variant gets the compute of this one
    c.ablation.variants = (*(v for v in VARIANTS if not v.startswith("full_")), *BETAS)  # that `ablate` trains
    c.ablation.orderings = ORDERINGS
    _apply(c, a.variant)
    return c


def _from_then_on(weight: float, distill: int = DISTILL_STEPS) -> tuple[tuple[int, float], ...]:
    """Nothing while distilling, `weight` during RL."""
    return ((distill, 0.0), (distill + 1, weight))


def _anchor(weight: float) -> tuple[tuple[int, float], ...]:
    """`wmsd`'s weight while distilling, where nothing else has one; `weight` during RL."""
    return ((0, ANCHOR), (DISTILL_STEPS, ANCHOR), (DISTILL_STEPS + 1, weight))


def _rates(first: float, distill: int = DISTILL_STEPS) -> tuple[tuple[int, float], ...]:
    """Learning rates by step: even at first, falling to RL's while distilling, and on to the last one."""
    return ((0, first), (distill // 2, first), (distill, RL_RATE), (STEPS, LAST_RATE))


def _apply(c: ConfigDict, variant: str) -> None:
    """Changes the config of `wmsd` into a variant's."""
    if variant in ("on_policy", "off_policy", "on_policy_guided"):
        c.objective.rl = "none"
    if variant in ("on_policy_guided", "wmsd_guided"):
        c.demonstrator.guidance = GUIDANCE
        c.objective.rl_weight = _from_then_on(1.0, GUIDED_DISTILL_STEPS)
        c.optimizer.learning_rate = _rates(DISTILL_RATE, GUIDED_DISTILL_STEPS)
    if variant == "off_policy":
        c.rollout.role = "demonstrator"
    elif variant in ("on_policy_reward", "judge_free"):
        c.objective.beta_d = _anchor(REWARD_ANCHOR)
        c.rollout.weights = ConfigDict({"task": 0.0, "agent": 0.0, "consistency": 0.0, "distill": 1.0})
        c.rollout.distill_min_time = HIGH_NOISE if variant == "judge_free" else 0.0
    elif variant == "rl_only":
        c.objective.beta_d = ((0, 0.0),)
        c.objective.rl_weight = ((0, 1.0),)
        c.objective.beta_base = ANCHOR  # tied to the base as the others are to the Demonstrator: untied, it runs away
        c.optimizer.learning_rate = _rates(RL_RATE)
    elif variant == "wmsd_no_consistency":
        c.rollout.weights.consistency = 0.0
    elif variant == "wmsd_grpo":
        c.objective.rl = "flow_grpo"
        c.objective.beta_d = _anchor(ANCHOR / 15)  # log-densities are means over thousands of entries: weak gradients
        c.sampler.eta = 0.7
    elif variant == "wmsd_nft":
        c.objective.rl = "nft"
    elif variant == "full_weights":
        c.executor.rank = 0
        c.optimizer.learning_rate = _rates(DISTILL_RATE / 2)
    elif variant == "full_kinds":
        c.annotator.options.kinds = KINDS["full"]
    elif variant.startswith("beta_"):
        try:
            c.objective.beta_d = _anchor(float(variant.removeprefix("beta_")))
        except ValueError as error:
            raise UserError(f"variant {variant!r}: beta_ is followed by a number") from error
    elif variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)} and beta_X")


# (above, below, metric, claim); names of variants or of the roles that train nothing.
ORDERINGS = (
    # What the paper says
    ("on_policy", "off_policy", "average", "on-policy distillation is above off-policy distillation"),
    ("on_policy_reward", "on_policy", "average", "the distillation reward adds to the anchor"),
    ("demonstrator", "on_policy", "average", "distillation alone does not pass the Demonstrator"),
    ("wmsd", "on_policy", "average", "RL adds to distillation"),
    ("wmsd", "demonstrator", "task", "WMSD passes the Demonstrator on the task"),
    ("wmsd", "demonstrator", "agent", "WMSD passes the Demonstrator on the agent"),
    ("wmsd", "demonstrator", "consistency", "WMSD passes the Demonstrator on consistency"),
    ("wmsd", "demonstrator", "average", "WMSD passes the Demonstrator on the average"),
    ("wmsd", "demonstrator", "all", "WMSD passes the Demonstrator on all three at once"),
    ("wmsd_grpo", "demonstrator", "average", "WMSD with Flow-GRPO passes the Demonstrator, too"),
    ("wmsd", "rl_only", "average", "RL alone stays below WMSD"),
    ("wmsd", "beta_0", "average", "RL without the anchor stays below WMSD"),
    ("wmsd", "beta_1", "average", "too strong an anchor stays below WMSD"),
    ("wmsd", "wmsd_no_consistency", "consistency", "without the consistency reward the judge is gamed"),
    # What it does not say
    ("judge_free", "on_policy", "average", "over high noise alone, the distillation reward adds to the anchor"),
    ("judge_free", "demonstrator", "average", "over high noise alone, it passes the Demonstrator with no judge"),
    ("on_policy_guided", "on_policy", "average", "a guided Demonstrator teaches more"),
    ("on_policy_guided", "demonstrator", "average", "distilling a guided Demonstrator passes the unguided one"),
    ("wmsd_guided", "wmsd", "task", "a guided Demonstrator adds to WMSD on the task"),
    ("wmsd_guided", "wmsd", "consistency", "a guided Demonstrator adds to WMSD on consistency"),
    ("wmsd_guided", "wmsd", "all", "a guided Demonstrator adds to WMSD on all three at once"),
    ("wmsd_nft", "wmsd", "average", "DiffusionNFT does more than AWM"),
)
