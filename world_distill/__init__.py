"""World Model Self-Distillation (WMSD, arXiv 2606.12072) in JAX/Flax for TPU pods and GPUs.

    import world_distill as wd

    model = wd.load("wan22_5b", base="weights/wan22-5b")
    told  = model.tell("kitchen.png", task="[hand]: Pick up the cup.")
    shown = model.tell("kitchen.png", solution="A hand reaches …")
    clips = wd.rollout(model, told, executor="executor.safetensors", steps=12, seed=0).clips
    judge = wd.ServerJudge(servers=["http://localhost:8000/v1"], model="Qwen/…")
    print(wd.judge(judge, clips, told).scores)
    trainer = wd.Trainer(model, wd.Objective(rl="awm", beta_d=0.01), wd.RolloutSettings(group=8), judge)
    state = trainer.init(seed=0)
    state, metrics = trainer.step(state, [(told, shown)])

Names are imported when they are used, so importing the package loads no JAX. `__all__` lists them:

    load, Model, Told                 a family with its weights, and what it is told
    rollout, Clips, judge             clips, and a judge's answers about them
    Trainer                           `init` and `step` of the method
    Objective, RolloutSettings, OptimizerSettings, default_config, load_config      settings
    ServerJudge, LocalJudge, ServerAnnotator, LocalAnnotator                        VLMs
    ScorerJudge, ScorerServerJudge, ClipScore                                       learned rewards as judges
    train, evaluate, export_lora, export_merged, convert, save_lora                 what the verbs do
    UserError                         an error that the user can mend
"""

from etils import epy

__version__ = "0.1.0"

with epy.lazy_api_imports(globals()):
    from world_distill.data.annotation.local import LocalAnnotator
    from world_distill.data.annotation.server import ServerAnnotator
    from world_distill.errors import UserError
    from world_distill.judges.clip_score import ClipScore
    from world_distill.judges.local import LocalJudge
    from world_distill.judges.scorer import ScorerJudge
    from world_distill.judges.scorer_server import ScorerServerJudge
    from world_distill.judges.server import ServerJudge
    from world_distill.programs.evaluate import evaluate
    from world_distill.programs.export import export_lora, export_merged
    from world_distill.programs.notebook import Clips, Model, Told, Trainer, judge, load, rollout, save_lora
    from world_distill.programs.train import train
    from world_distill.settings.defaults import default_config
    from world_distill.settings.loading import load_config
    from world_distill.settings.objective import Objective
    from world_distill.settings.optimizer import OptimizerSettings
    from world_distill.settings.rollout import RolloutSettings
    from world_distill.weights.convert import convert

__all__ = [
    "__version__",
    "ClipScore",
    "Clips",
    "LocalAnnotator",
    "LocalJudge",
    "Model",
    "Objective",
    "OptimizerSettings",
    "RolloutSettings",
    "ScorerJudge",
    "ScorerServerJudge",
    "ServerAnnotator",
    "ServerJudge",
    "Told",
    "Trainer",
    "UserError",
    "convert",
    "default_config",
    "evaluate",
    "export_lora",
    "export_merged",
    "judge",
    "load",
    "load_config",
    "rollout",
    "save_lora",
    "train",
]
