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
  sft               supervised fine-tuning on the clips of records, which `import-videos` or `demonstrate` made

Guidance leads away from the empty text, whose states `quickstart`, `ablate` and `encode` keep beside the records; the
base has to know that text. Any variant but rl_only and sft takes --config.demonstrator.guidance=2.

The base that ships was pretrained in three stages. models/tiny/base_1.jsonl, base_2.jsonl and base_3.jsonl are their
logs, and the metadata of models/tiny/base_3.safetensors names the three commands. All three ship; `--config.base=2` is
the one before.
  1  18,000 updates of 32 clips with loss_power 0, drop_text 0, two_legs 0.25 and faults blink 0.08, jump 0.07, vanish
     0.05, by a network without add_scene.
  2  world-distill pretrain --config sandbox --seed 10 --config.host_devices=1 --config.pretrain.steps=4900
     --config.pretrain.start=1 --config.pretrain.fresh='head\..*' --config.pretrain.learning_rate=0.006
     --config.clips.options.faults.blink=0.03 --config.clips.options.faults.jump=0.04
     --config.clips.options.faults.vanish=0.02 --workdir stage2
  3  world-distill pretrain --config sandbox --seed 11 --config.host_devices=1 --config.pretrain.steps=2000
     --config.pretrain.start=2 --config.pretrain.learning_rate=0.004 --workdir stage3
     GLIBC_TUNABLES=glibc.malloc.hugetlb=1 saves page faults, on Linux.
A base from nothing by this config alone (18,000 updates): not measured yet.
"""

from ml_collections import ConfigDict

from world_distill.config import UserError, default_config, did_you_mean, parse_arg

KINDS = {"simple": ("go", "beside"), "full": ("go", "beside", "push", "sequence")}
VARIANTS = (
    "wmsd", "wmsd_grpo", "wmsd_nft", "wmsd_no_consistency", "on_policy", "on_policy_reward", "judge_free", "off_policy",
    "rl_only", "wmsd_guided", "on_policy_guided", "full_weights", "full_kinds", "sft",
)  # fmt: skip
BETAS = ("beta_0", "beta_0.001", "beta_0.1", "beta_1")  # around the anchor weight of `wmsd`
ANCHOR = 0.01  # weight of the anchor: the paper's best
REWARD_ANCHOR = 0.05  # ... where Eq. 9 is the only reward
GUIDANCE = 2.0  # scale of the guided variants' Demonstrator
HIGH_NOISE = 0.8  # lower bound of Eq. 9's integral: the first three of the sampler's six steps
DISTILL_STEPS = 50  # of the steps, at the start, are distillation alone
GUIDED_DISTILL_STEPS = 42  # ... with a guided Demonstrator, whose velocities cost two forwards
STEPS = 74  # in all
DISTILL_RATE, RL_RATE, LAST_RATE = 4e-3, 1e-3, 1e-4  # learning rates: at first, of RL, at the end


def get_config(arg: str = "") -> ConfigDict:
    """The config of a variant; see the module's text."""
    a = parse_arg(arg, variant="wmsd", kinds="simple")
    c = default_config("scenes", "clips", "pretrain", "ablation", "reproduce")
    c.base = "3"
    c.text_length = 40
    c.encode_batch = 64
    c.host_devices = 2
    c.mesh.data, c.mesh.fsdp = -1, 1

    c.world = ConfigDict({  # see `world_distill.sandbox.world.World`
        "cells": 5, "size": 30, "frames": 9, "agents": (2, 2), "rings": (2, 2), "crate": 0.3,
        "shapes": ("disc", "square", "diamond"),
    })  # fmt: skip
    c.model = ConfigDict({
        "family": "tiny", "size": 30, "frames": 9, "patch": 6, "stride": 4, "width": 96, "depth": 4, "heads": 3,
        "mlp": 3, "text_width": 64, "add_scene": True, "remat": False,
        "unroll": 4,  # all blocks: a quarter faster on a CPU
        "merge_lora": True,  # the faster way for small layers
        "int8": False,
    })  # fmt: skip

    c.scenes.factory = "world_distill.sandbox:write_scenes"
    c.scenes.options = ConfigDict({"world": "@world"})
    c.scenes.train, c.scenes.validation, c.scenes.test = 400, 64, 256
    c.annotator.factory = "world_distill.sandbox:make_oracle"
    c.annotator.options = ConfigDict({"world": "@world", "kinds": KINDS[a.kinds]})
    c.annotator.test_pairs, c.annotator.max_side, c.annotator.max_failures = 2, 0, 0.0

    c.executor.rank, c.executor.alpha = 16, 16.0
    c.executor.targets = r"blocks\..*|text_in|text_out|pooled"
    c.sampler.steps, c.sampler.shift = 6, 3.0

    c.rollout.tasks, c.rollout.group = 16, 4
    c.rollout.weights.consistency = 2.0
    c.rollout.clip = 3.0
    c.rollout.normalise, c.rollout.std = "none", "group"

    c.objective.rl_weight = _from_then_on(1.0)
    c.objective.beta_d = _anchor(ANCHOR)
    c.objective.updates = 16
    c.objective.draws = 1
    c.optimizer.name = "muon"
    c.optimizer.learning_rate = _rates(DISTILL_RATE)
    c.optimizer.grad_clip = 0.005

    c.judge.factory = "world_distill.sandbox:make_oracle"
    c.judge.options = ConfigDict({"world": "@world"})
    # The held-out judge, where a run names one, is stricter than the judge.
    strict = {"reach": 0.3, "residual": 0.3, "moved": 0.7}
    c.held_out.options = ConfigDict({"world": "@world", "tolerance": strict})
    c.benchmark.factory = "world_distill.sandbox:make_benchmark"
    c.benchmark.options = ConfigDict({"world": "@world"})

    c.steps = STEPS
    c.log_every, c.save_every, c.evaluate_every, c.evaluate_batch = 10, 20, 20, 64

    # What no caption says, so that the Demonstrator inherits it and RL has something to mend: two in five pretraining
    # clips stop half-way, and in one in four a thing blinks, jumps or vanishes.
    faults = {"short": 0.4, "short_travel": (0.5, 0.5), "other": 0.08, "blink": 0.1, "jump": 0.1, "vanish": 0.06}
    c.clips.factory = "world_distill.sandbox:make_clips"
    c.clips.options = ConfigDict({"world": "@world", "styles": (0.3, 0.4, 0.3), "two_legs": 0.5, "faults": faults})
    # Fine-tuning needs other records.
    c.ablation.variants = (*(v for v in VARIANTS if not v.startswith("full_") and v != "sft"), *BETAS)
    c.ablation.orderings = ORDERINGS
    trained = ("sft", "off_policy", "on_policy", "wmsd")
    c.reproduce.rows = (
        ("base", "base", "wmsd"), ("demonstrator", "demonstrator", "wmsd"), *((v, "executor", v) for v in trained),
    )  # fmt: skip
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
    elif variant == "sft":
        c.objective.kind, c.objective.rl, c.objective.beta_d = "sft", "none", ((0, 0.0),)
        # As the base was trained.
        c.objective.sft_shift, c.objective.sft_power = c.pretrain.shift, c.pretrain.loss_power
    elif variant == "full_kinds":
        c.annotator.options.kinds = KINDS["full"]
    elif variant.startswith("beta_"):
        try:
            c.objective.beta_d = _anchor(float(variant.removeprefix("beta_")))
        except ValueError as error:
            raise UserError(f"variant {variant!r}: beta_ is followed by a number") from error
    elif variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}; {did_you_mean(variant, (*VARIANTS, 'beta_X'))}")


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
