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
    train, evaluate, export_lora, export_merged, convert, save_lora                 what the verbs do
    UserError                         an error that the user can mend
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Clips": "programs.notebook",
    "LocalAnnotator": "data.annotation.local",
    "LocalJudge": "judges.local",
    "Model": "programs.notebook",
    "Objective": "settings.objective",
    "OptimizerSettings": "settings.optimizer",
    "RolloutSettings": "settings.rollout",
    "ServerAnnotator": "data.annotation.server",
    "ServerJudge": "judges.server",
    "Told": "programs.notebook",
    "Trainer": "programs.notebook",
    "UserError": "errors",
    "convert": "weights.convert",
    "default_config": "settings.defaults",
    "evaluate": "programs.evaluate",
    "export_lora": "programs.export",
    "export_merged": "programs.export",
    "judge": "programs.notebook",
    "load": "programs.notebook",
    "load_config": "settings.loading",
    "rollout": "programs.notebook",
    "save_lora": "programs.notebook",
    "train": "programs.train",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604

if TYPE_CHECKING:
    from world_distill.data.annotation.local import LocalAnnotator as LocalAnnotator
    from world_distill.data.annotation.server import ServerAnnotator as ServerAnnotator
    from world_distill.errors import UserError as UserError
    from world_distill.judges.local import LocalJudge as LocalJudge
    from world_distill.judges.server import ServerJudge as ServerJudge
    from world_distill.programs.evaluate import evaluate as evaluate
    from world_distill.programs.export import export_lora as export_lora
    from world_distill.programs.export import export_merged as export_merged
    from world_distill.programs.notebook import Clips as Clips
    from world_distill.programs.notebook import Model as Model
    from world_distill.programs.notebook import Told as Told
    from world_distill.programs.notebook import Trainer as Trainer
    from world_distill.programs.notebook import judge as judge
    from world_distill.programs.notebook import load as load
    from world_distill.programs.notebook import rollout as rollout
    from world_distill.programs.notebook import save_lora as save_lora
    from world_distill.programs.train import train as train
    from world_distill.settings.defaults import default_config as default_config
    from world_distill.settings.loading import load_config as load_config
    from world_distill.settings.objective import Objective as Objective
    from world_distill.settings.optimizer import OptimizerSettings as OptimizerSettings
    from world_distill.settings.rollout import RolloutSettings as RolloutSettings
    from world_distill.weights.convert import convert as convert


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"world_distill.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
