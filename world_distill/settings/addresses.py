"""Addresses of the parts that a config names, `package:function`, and the addresses that earlier versions wrote."""

from collections.abc import Mapping
from typing import Any

# Address in an earlier version -> today's.
_OLD = {
    "world_distill.judges.server:ServerJudge": "world_distill.judges:ServerJudge",
    "world_distill.judges.local:LocalJudge": "world_distill.judges:LocalJudge",
    "world_distill.judges.brightness:Brightness": "world_distill.judges:Brightness",
    "world_distill.data.vlm_annotator:ServerAnnotator": "world_distill.data:ServerAnnotator",
    "world_distill.data.local_annotator:LocalAnnotator": "world_distill.data:LocalAnnotator",
    "world_distill.sandbox.factories:oracle": "world_distill.sandbox:make_oracle",
    "world_distill.sandbox.factories:benchmark": "world_distill.sandbox:make_benchmark",
    "world_distill.sandbox.factories:random_clips": "world_distill.sandbox:make_clips",
    "world_distill.sandbox.scenes:write_scenes": "world_distill.sandbox:write_scenes",
}


def current(address: str) -> str:
    """Today's address of the part that `address` named in this or an earlier version."""
    return _OLD.get(address, address)


def translate(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section, and all in it, with today's addresses as the values of `factory`."""
    found: dict[str, Any] = {
        key: translate(value) if isinstance(value, Mapping) else value for key, value in section.items()
    }
    if isinstance(found.get("factory"), str):
        found["factory"] = current(found["factory"])
    return found
