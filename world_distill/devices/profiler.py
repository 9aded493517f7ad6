"""`world-distill train --profile STEPS`: XProf's trace of chosen steps, in WORKDIR/profile.

Open it with `pip install xprof && xprof WORKDIR/profile`, or in TensorBoard. Steps, their programs (rollout, decode,
demonstrator, update) and what stops the loop (save, evaluate) have their names there. Each process of a job writes what
its own devices did.
"""

import pathlib

import jax

from world_distill import console
from world_distill.devices.clock import Clock
from world_distill.errors import UserError


class Profiler:
    """Traces steps of a loop that are one after the other into one trace. The device has to be idle at its borders."""

    def __init__(self, folder: pathlib.Path, steps: frozenset[int], *, first: int, last: int):
        """`first` and `last` are the steps that the loop is going to make.

        Raises:
          UserError: some of `steps` are not among them.
        """
        outside = sorted(step for step in steps if not first <= step <= last)
        if outside:
            names = ", ".join(map(str, outside[:5])) + (", ..." if len(outside) > 5 else "")
            coming = f"makes steps {first} to {last}" if first <= last else f"has none left to make after step {last}"
            raise UserError(f"--profile: step {names} cannot be traced: the run {coming}")
        self._folder, self._steps, self._running = folder, steps, False

    def borders(self, step: int) -> bool:
        """Whether a trace starts or stops behind a step."""
        return (step in self._steps) != (step + 1 in self._steps)

    def before(self, step: int, clock: Clock) -> None:
        if step in self._steps and not self._running:
            with clock.away("profile"):
                jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, clock: Clock) -> None:
        if self._running and step + 1 not in self._steps:
            with clock.away("profile"):
                self.close()
            console.say(f"step {step}: trace written to {self._folder}")

    def close(self) -> None:
        """Ends a trace that was left open."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
