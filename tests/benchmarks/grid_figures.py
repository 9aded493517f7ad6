"""What a sampler's grid does to draws of times and to stochastic steps.

    python tests/benchmarks/grid_figures.py [--times 1 0.9 0.5] [--flow-grpo 0.7] [--cps 0.8]

A row for each step: how often it is drawn (`objective.times`), and the std of its noise under each `sampler.sde`. The
noise in x_next is counted over the noise level t_next, for a velocity that is exact: above 1 there is too much of it.
CPS has 1 everywhere. The default grid is that of LTX-2's distilled sampler; its closing 0 may be left out.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import numpy as np

from world_distill.core import flow, sampling

DISTILLED = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909, 0.725, 0.422)
HEADS = ("step", "t", "t_next", "by index", "by dt", "std, flow_grpo", "noise / t_next", "std, cps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, nargs="+", default=DISTILLED, help="noisiest first")
    parser.add_argument("--flow-grpo", type=float, default=0.7, help="sampler.eta of flow_grpo")
    parser.add_argument("--cps", type=float, default=0.8, help="sampler.eta of cps")
    args = parser.parse_args()
    grid = flow.sampling_times(None, explicit=args.times)
    print("".join(f"{head:>16}" for head in HEADS))
    for row in rows(grid, args.flow_grpo, args.cps):
        print("".join(f"{value:>16.3g}" for value in row))


def rows(grid: np.ndarray, flow_grpo: float, cps: float) -> list[tuple[float, ...]]:
    """The columns of `HEADS`, a row for each step."""
    t, t_next = (grid[i:][: len(grid) - 1].astype(np.float64) for i in (0, 1))
    stds = [
        sampling.step_stds(grid, sampling.DIFFUSIONS[sde](grid, eta), sde)
        for sde, eta in (("flow_grpo", flow_grpo), ("cps", cps))
    ]
    # Equation (1): of the implied noise t_next is kept, less std^2 / (2 t); the rest is fresh.
    level = np.hypot(t_next - stds[0] ** 2 / (2 * t), stds[0])
    surplus = np.where(t_next > 0, level / np.where(t_next > 0, t_next, 1.0), np.nan)
    even = np.full(len(t), 1 / len(t))
    return list(zip(range(len(t)), t, t_next, even, t - t_next, stds[0], surplus, stds[1], strict=True))


if __name__ == "__main__":
    main()
