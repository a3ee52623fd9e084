"""Writers whose answers are known beforehand, so that a test can say what a summary must hold."""

from collections.abc import Callable, Iterable, Sequence

from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.mllm.interface import Answer, Batch, Decoding, Work, Writer


class Planted:
    """Answers with what `reply` makes of a prompt, `size` prompts at a time; keeps what it was asked."""

    identity = "planted"

    def __init__(self, reply: Callable[[Prompt], str] = lambda prompt: prompt.text, size: int = 4) -> None:
        self.reply, self.size = reply, size
        self.batches: list[list[str]] = []

    @property
    def asked(self) -> int:
        """How many prompts were answered."""
        return sum(map(len, self.batches))

    def write(self, work: Work) -> None:
        """Answer until nothing waits."""
        while asks := work.take(self.size):
            self.batches.append([ask.prompt.text for ask in asks])
            work.give([(ask.place, Answer(self.reply(ask.prompt), 3, 2)) for ask in asks])


class StoreInMemory(dict[str, str]):
    """A store of answers that no file has."""

    def get(self, keys: Iterable[str]) -> dict[str, str]:  # type: ignore[override]
        """Return the texts that are known."""
        return {key: self[key] for key in keys if key in self}

    def add(self, kind: str, model: str, keys: Sequence[str], answers: Sequence[Answer], seconds: float) -> None:
        """Keep a batch of answers."""
        self.update(zip(keys, (answer.text for answer in answers), strict=True))


def answers_of(writer: Writer, prompts: Sequence[Prompt], decoding: Decoding) -> list[Answer]:
    """Return the answer to each prompt.

    Raises:
        UserError: One of them cannot be answered.
    """
    work = Batch(prompts, decoding)
    writer.write(work)
    if work.failures:
        raise UserError(next(iter(work.failures.values())))
    return [work.answers[place] for place in range(len(prompts))]
