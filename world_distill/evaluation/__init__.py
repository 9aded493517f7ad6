"""Scores of clips: benchmarks, a held-out judge, agreement between judges."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from world_distill.evaluation.dreamgen import DreamGenBench
    from world_distill.evaluation.vlm_benchmark import VlmBenchmark
    from world_distill.evaluation.worldtasks import WorldTasksBench

__all__ = ["DreamGenBench", "VlmBenchmark", "WorldTasksBench"]
