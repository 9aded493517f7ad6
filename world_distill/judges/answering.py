"""What judges share that answer one request after another: `ask` by `ask_each`, and the name they show."""

from collections.abc import Callable, Sequence

from world_distill.interfaces import JudgeAnswer, JudgeRequest

Done = Callable[[int, JudgeAnswer], None]


class AnswersEach:
    """Base of `interfaces.Judge` classes with an `ask_each`, which makes their `ask`.

    Attributes:
      name: changes with whatever changes answers.
    """

    name: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def ask(self, requests: Sequence[JudgeRequest]) -> list[JudgeAnswer]:
        """One answer a request, in order; what could not be answered has an error instead. Raises as `ask_each`."""
        answers: dict[int, JudgeAnswer] = {}
        self.ask_each(requests, answers.__setitem__)
        return [answers[i] for i in range(len(requests))]

    def ask_each(self, requests: Sequence[JudgeRequest], done: Done) -> None:
        """Calls `done(number of the request, answer)` for each as it is answered."""
        raise NotImplementedError
