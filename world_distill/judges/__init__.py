"""Questions to a vision-language model about a clip, and a memory of its answers."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from world_distill.judges.brightness import Brightness
    from world_distill.judges.clip_score import ClipScore
    from world_distill.judges.local import LocalJudge
    from world_distill.judges.scorer import ScorerJudge
    from world_distill.judges.scorer_server import ScorerServerJudge
    from world_distill.judges.server import ServerJudge

__all__ = ["Brightness", "ClipScore", "LocalJudge", "ScorerJudge", "ScorerServerJudge", "ServerJudge"]
