"""Questions to a vision-language model about a clip, and a memory of its answers."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from world_distill.judges.brightness import Brightness
    from world_distill.judges.local import LocalJudge
    from world_distill.judges.server import ServerJudge

__all__ = ["Brightness", "LocalJudge", "ServerJudge"]
