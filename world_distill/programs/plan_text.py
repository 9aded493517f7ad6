"""The text that `plan` prints."""

from collections.abc import Sequence
from typing import Any

from world_distill import console
from world_distill.devices import cycles as cycles_lib


def describe(result: dict[str, Any], *, explain: bool = False) -> list[str]:
    """Lines for people; with `explain`, the most expensive instructions of each phase, and where they come from."""
    chip = result["chip"]
    has = f" of {chip['hbm_gib']:g}" if chip else ""
    mesh = " ".join(f"{name}={size}" for name, size in result["mesh"].items())
    lines = [
        f"{result['devices']} x {result['kind']}, mesh {mesh}, {result['rollouts_per_step']} {result['rows']} a step"
    ]
    lines.append(
        f"{'phase':>13}  {'peak GiB' + has:>17}  (args  temps  output  beside)  compile s       PFLOP  collectives"
    )
    for phase in result["phases"]:
        if phase["problem"]:
            lines.append(f"{phase['name']:>13}  does not fit: {phase['problem']}")
            lines += [f"{'':>15}{line}" for line in phase["largest"]]
            continue
        counts = ", ".join(f"{n} {kind}" for kind, n in phase["collectives"].items()) or "none"
        lines.append(
            f"{phase['name']:>13}  {phase['peak'] + phase['beside']:17.2f}  ({phase['arguments']:4.1f}  "
            f"{phase['temporaries']:5.1f}  {phase['output']:6.1f}  {phase['beside']:6.1f})  "
            f"{phase['compile_seconds']:9.0f}  {phase['flops'] / 1e15:10.2f}  {counts}"
        )
    lines += [
        f"{phase['name']}: {phase['host']:.1f} GiB of each chip go to the host"
        for phase in result["phases"]
        if phase["host"]
    ]
    if any(sum(phase["cycles"].values()) for phase in result["phases"]):
        lines += _describe_cycles(result)
    if explain:
        lines += _explain(result)
    if "step_seconds" in result and result["fits"]:
        how = (
            "the compiler's cycles" if result["estimated"] else f"{console.percent(result['utilisation'])} of the peak"
        )
        asked = f" and {_range(result['judge_requests_per_second'])} judge requests"
        lines.append(
            f"predicted from {how}: {_range(result['step_seconds'])} s a step, {_range(result['rollouts_per_second'])} "
            f"{result['rows']}{asked if result['rows'] == 'rollouts' else ''} a second, "
            f"MFU {_range([100 * part for part in result['mfu']])} %"
        )
    over = [phase["name"] for phase in result["phases"] if not phase["problem"] and not phase["fits"]]
    lines += [
        f"{name}: the program fits, but not beside what else lies in the memory, with 5 % of its peak for gaps"
        for name in over
    ]
    lines.append("fits" if result["fits"] else "does not fit")
    return lines


def _describe_cycles(result: dict[str, Any]) -> list[str]:
    """A table of one call of each phase on one chip."""
    kinds = "  ".join(f"{kind:>11}" for kind in cycles_lib.KINDS)
    lines = [f"{'phase':>13}  {'M cycles':>9}  {kinds}  kernels TFLOP    sent GB       seconds"]
    for phase in result["phases"]:
        if phase["problem"]:
            continue
        each = "  ".join(f"{phase['cycles'][kind] / 1e6:11.0f}" for kind in cycles_lib.KINDS)
        seconds = _range(phase["seconds"]) if phase["seconds"] else ""
        lines.append(
            f"{phase['name']:>13}  {sum(phase['cycles'].values()) / 1e6:9.0f}  {each}  "
            f"{phase['kernel_flops'] / result['devices'] / 1e12:13.1f}  {phase['sent'] / 1e9:9.1f}  {seconds:>12}"
        )
        if phase["endless"]:
            lines.append(f"{'':>15}at least: of {phase['endless']} loops the turns are not known, and one is counted")
        if phase["unknown"]:
            lines.append(f"{'':>15}at least: the compiler does not know the cycles of {phase['unknown']} instructions")
        if phase["unread"]:
            lines.append(f"{'':>15}at least: which chips take part cannot be read of {phase['unread']} collectives")
    return lines


def _explain(result: dict[str, Any]) -> list[str]:
    lines = []
    for phase in result["phases"]:
        total = sum(phase["cycles"].values())
        if phase["problem"]:
            continue
        if not phase["expensive"]:
            lines.append(f"{phase['name']}: the compiler estimates no cycles for {result['kind']}")
            continue
        lines.append(
            f"{phase['name']}: the most expensive instructions, in M cycles of {total / 1e6:,.0f} outside kernels"
        )
        for one in phase["expensive"]:
            where = f"  {one['source']}" if one["source"] else ""
            lines.append(
                f"{one['cycles'] / 1e6:13,.1f}  {console.percent(one['cycles'] / total):>6}  {one['runs']:6} x "
                f"{one['kind']:<11}  {one['what']}{where}"
            )
    return lines


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.3g}" for value in values)
    return low if low == high else f"{low} to {high}"
