"""How fast a training step is, and where its time goes, without making the device wait.

JAX gives programs to the device and goes on; the device runs them in that order. So a thread of its own waits for one
small result of each in turn, and the time between two of them is what the later one took:

    loop      give roll, give show, judge, give update, give roll, ...     never waits for the clock
    device         |-- roll --|- show -|         |-- update --|-- roll --|
    clock                     *        *                      *          *

Figures belong to a turn of the loop: with `rollout.staleness` 1, its rollouts are those of the next step.

    time/NAME               seconds that the device took for a program: rollout, decode, demonstrator, update
    time/step               from the end of one update to that of the next, without `time/save` and the like
    time/idle               of it, when the device had none of these to run and nothing was compiled: it waited for the
                            judge or for the loop. `time/judge_wait` is the loop's wait, which the device may work in
    time/compile            of it, what went into tracing and compiling, where there was such a thing
    time/save, evaluate     seconds for which the loop stood still before this step, for checkpoints and for evaluation
    speed/tflop             operations of the step's programs, as traced, over all devices (`flops`): 1e12 of them
    speed/tflops            of these, a second and device
    speed/mfu, speed/hfu    shares of the devices' peak (`chips`; none for a CPU): without and with what a backward
                            pass computes again to save memory
    speed/tokens            tokens of the step's clips a second, each token once, however often the network sees it
    speed/goodput           share of the time since training was called, all in all, that went into training steps: not
                            into starting, reading weights, compiling, saving, evaluating
    speed/memory_gib        most that a device of this process ever held, where devices tell
"""

import contextlib
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from world_distill.devices import chips, flops
from world_distill.devices.compilation import Compiles

UPDATE = "update"  # the program that ends a step
_PATIENCE = 1.0  # seconds; the clock is that much behind a device that has ended a step only if something is wrong


class Clock:
    """Measures the steps of a loop: `program` makes its programs known, `turn` and `away` say what the loop does."""

    def __init__(
        self, *, devices: int, tokens: int, started: float, first_call: Callable[[str], None] = lambda name: None
    ):
        """
        Args:
          devices: of all processes.
          tokens: of all clips of a step.
          started: `time.perf_counter()` when training was called.
          first_call: is told the name of a program that is called for the first time, and so compiled.
        """
        self._first_call = first_call
        self._devices, self._tokens, self.started = devices, tokens, started
        chip = chips.chip(jax.local_devices()[0].device_kind)
        self._peak = chip.tflops * 1e12 * devices if chip else None
        self._compiles = Compiles()
        self._turn = -1
        self._work: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])  # operations: all, and without remat's
        self._compiling: dict[int, list[float]] = {}  # seconds of compilation in all, before and after a turn
        self._away: dict[str, float] = defaultdict(float)  # since the last figures
        self._before = time.perf_counter()  # the end of the last step
        self._good = 0.0
        # What the thread writes:
        self._changed = threading.Condition()
        self._seconds: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._ended: dict[int, float] = {}
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="clock", daemon=True).start()

    def close(self) -> None:
        self._compiles.close()
        self._queue.put(None)  # not waited for: the device may hang

    def program(self, name: str, function: Any, pick: Callable[[Any], jax.Array]) -> Callable[..., Any]:
        """The jitted function, on the clock as `name` whenever it is called.

        `pick` takes of its results a small array that the program computes and that is never donated.
        """
        counts = None

        def call(*args):
            nonlocal counts
            with jax.profiler.TraceAnnotation(name):
                if counts is None:
                    self._compiles.expect()
                    self._first_call(name)
                    jaxpr = function.trace(*args).jaxpr  # which the call uses again
                    counts = flops.count(jaxpr), flops.count(jaxpr, remat=False)
                given, compiled = time.perf_counter(), self._compiles.seconds
                out = function(*args)
                given += self._compiles.seconds - compiled
            for i, count in enumerate(counts):
                self._work[self._turn][i] += count
            self._queue.put((self._turn, name, pick(out), given))
            return out

        return call

    @contextlib.contextmanager
    def turn(self, step: int) -> Iterator[None]:
        """A turn of the loop, which ends finished step `step`."""
        self._turn, self._compiling[step] = step, [self._compiles.seconds]
        with jax.profiler.StepTraceAnnotation("train", step_num=step), self._compiles.visit("step", f"step {step}"):
            yield
        if step in self._compiling:
            self._compiling[step].append(self._compiles.seconds)

    @contextlib.contextmanager
    def away(self, what: str) -> Iterator[None]:
        """Time of the loop that is not training; all steps until then have their figures."""
        began = time.perf_counter()
        with jax.profiler.TraceAnnotation(what), self._compiles.visit(what, f"{what} after step {self._turn}"):
            yield
        self._away[what] += time.perf_counter() - began

    def figures(self, step: int) -> dict[str, float]:
        """Those of a step whose update has ended; to be asked for each step in turn."""
        with self._changed:
            if not self._changed.wait_for(lambda: step in self._ended, _PATIENCE):
                logging.debug("the clock has not seen the end of step %d", step)
            ended = self._ended.pop(step, time.perf_counter())
            phases = self._seconds.pop(step, {})
        seconds = max(ended - self._before - sum(self._away.values()), 1e-9)
        before, *after = self._compiling.pop(step, [0.0, 0.0])
        compiling = (after or [self._compiles.seconds])[0] - before
        compiling = max(min(compiling, seconds - sum(phases.values())), 0.0)
        phases["idle"] = max(seconds - compiling - sum(phases.values()), 0.0)
        self._before, self._good = ended, self._good + seconds - compiling
        found = {"step": seconds} | phases | self._away | ({"compile": compiling} if compiling else {})
        self._away.clear()
        work, model = self._work.pop(step, (0.0, 0.0))
        speeds = {
            "tflop": work / 1e12,
            "tflops": work / 1e12 / seconds / self._devices,
            "tokens": self._tokens / seconds,
            "goodput": self._good / (time.perf_counter() - self.started),
        }
        if self._peak:
            speeds |= {"mfu": model / seconds / self._peak, "hfu": work / seconds / self._peak}
        memory = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
        if max(memory):
            speeds["memory_gib"] = max(memory) / 2**30
        return {f"time/{k}": v for k, v in found.items()} | {f"speed/{k}": v for k, v in speeds.items()}

    def _watch(self) -> None:
        last = 0.0
        while (item := self._queue.get()) is not None:
            step, name, array, given = item
            with contextlib.suppress(Exception):  # the loop meets the same, and can say more of it
                jax.block_until_ready(array)
            del item, array  # its memory is not the clock's to keep
            now = time.perf_counter()
            with self._changed:
                self._seconds[step][name] += now - max(last, given)
                if name == UPDATE:
                    self._ended[step] = now
                self._changed.notify_all()
            last = now
