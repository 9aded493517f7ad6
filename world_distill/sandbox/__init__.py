"""A small world with an exact physics and an oracle in the VLM's place, to run the whole method on a laptop CPU."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from world_distill.sandbox.factories import make_benchmark, make_clips, make_oracle
    from world_distill.sandbox.scenes import write_scenes

__all__ = ["make_benchmark", "make_clips", "make_oracle", "write_scenes"]
