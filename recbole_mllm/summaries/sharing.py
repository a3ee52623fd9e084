"""Summaries written by several processes: each takes its share, and then all is in the dataset's store.

A prompt that many ask (an item's, or the first block of users who began alike) goes to one process by the hash of its
content, a user's chain to one by the hash of the items it starts with: no prompt is written that one process would not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from recbole_mllm import ranks
from recbole_mllm.data.atomic import read_values, write_atomic
from recbole_mllm.data.schema import USUM_TYPES, store_file, usum_file
from recbole_mllm.errors import UserError
from recbole_mllm.files import remove_file
from recbole_mllm.prompts import Prompt
from recbole_mllm.settings import SummarySettings
from recbole_mllm.summaries.asking import Listed
from recbole_mllm.summaries.items import summarize_items
from recbole_mllm.summaries.lastexport import LastExport, by_user, line_of
from recbole_mllm.summaries.shards import ShardStore, opened_store
from recbole_mllm.summaries.stage import MakeScribe, Stage, item_scribe, marker_of, one_model, user_scribe
from recbole_mllm.summaries.store import Store, answer_key
from recbole_mllm.summaries.users import Earlier, Plan, as_rows, openings, preferences
from recbole_mllm.summaries.writing import Scribe


def share_of(content: str, size: int) -> int:
    """Return which of `size` processes `content` belongs to: the same on every machine and in every run."""
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % size


class Shares:
    """This process's part in writing the answers of one dataset; every process takes the same steps in the same order.

    Args:
        folder: The dataset's folder, the same files for all processes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._rank, self._size = folder, ranks.rank(), ranks.world_size()
        self.load_s = 0.0  # what loading models took
        self._merge()

    def is_mine(self, content: str) -> bool:
        """Return whether this process writes what belongs to `content`."""
        return share_of(content, self._size) == self._rank

    def write(self, make: MakeScribe, work: Callable[[Scribe], None]) -> None:
        """Let every process do its `work` with a scribe that keeps answers in its own store; then merge all stores."""
        with closing(ShardStore(self._folder, self._rank)) as store:
            scribe = make(store)
            scribe.whose = f" (the share of process {self._rank} of {self._size})"
            work(scribe)
            self.load_s += scribe.tally.load_s
            scribe.report()
        self._merge()

    def answer(self, make: MakeScribe, prompts: Iterable[Prompt]) -> None:
        """Have each of `prompts` answered by the process its content belongs to."""
        self.write(make, lambda scribe: scribe.serve(Listed(enumerate(self._own(scribe, prompts)))))

    def _own(self, scribe: Scribe, prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        seen: set[str] = set()
        for prompt in prompts:
            try:
                key = answer_key(scribe.identity, prompt, scribe.decoding)
            except OSError:  # an image that is gone: said when its answer is missed
                continue
            if key not in seen and self.is_mine(key):
                seen.add(key)
                yield prompt

    def _merge(self) -> None:
        ranks.meet()
        ranks.on_main(lambda: opened_store(self._folder).close())


class SharedAnswers:
    """Answers item prompts as a `Scribe` does, each written by one process, and every process gets them all."""

    def __init__(self, shares: Shares, make: MakeScribe, folder: Path) -> None:
        self._shares, self._make, self._folder = shares, make, folder

    def answer(self, prompts: Sequence[Prompt]) -> list[str]:
        """Return the answers, by the order of `prompts`."""
        self._shares.answer(self._make, prompts)
        with closing(Store(store_file(self._folder))) as store:
            return self._make(store).answer(prompts)


def write_in_shares(stage: Stage, plan: Plan, users: Set[str] | None, *, only_items: bool) -> float:
    """Write what `plan`'s rows lack, of `users` (None: all), each process its share; afterwards the store has it all.

    Nothing is done in a run of one process, or where nothing may be written. Each process's rows are left beside the
    export until `take_parts`. Returns the seconds that loading models took.
    """
    s = stage.settings
    if not ranks.is_launched() or s.summarize == "off":
        return 0.0
    ranks.on_main(lambda: _drop(_parts(stage)))  # of a run that was killed
    shares = Shares(stage.folder)
    with _led(partial(item_scribe, stage)) as make:
        answers = SharedAnswers(shares, make, stage.folder)
        summaries = summarize_items(answers, stage.style, stage.items, plan.items(s), s.item_summary)
    if not only_items:
        with _led(partial(user_scribe, stage)) as make:
            _write_users(stage, plan, users, shares, summaries, make)
    return shares.load_s


def _write_users(
    stage: Stage, plan: Plan, users: Set[str] | None, shares: Shares, summaries: Mapping[str, str], make: MakeScribe
) -> None:
    s = stage.settings
    with closing(Store(store_file(stage.folder))) as store:
        last = LastExport(usum_file(stage.folder, stage.tag), stage.tag, store)
        survey = last.survey(plan, marker_of(stage, summaries, make(store)))
    due = plan.of({user for user in survey.due if users is None or user in users})
    earlier = last.rows(survey.holds, survey.due)
    shares.answer(make, openings(stage.style, stage.items, summaries, due, s, earlier))
    mine = due.reading(name for name in due.positions if shares.is_mine(_beginning(due, name, s)))
    shares.write(make, lambda scribe: _write_chains(scribe, stage, summaries, mine, earlier))


def _write_chains(scribe: Scribe, stage: Stage, summaries: Mapping[str, str], plan: Plan, earlier: Earlier) -> None:
    texts = preferences(scribe, stage.style, stage.items, summaries, plan, stage.settings, earlier)
    path = usum_file(stage.folder, stage.tag)
    part = path.with_name(f"{path.name}.rank{ranks.rank()}")
    write_atomic(part, USUM_TYPES, map(line_of, as_rows(texts, plan)))


def take_parts(stage: Stage) -> Earlier:
    """Return the rows that the processes of this run have left, in the main process, and remove them.

    A run of one process has none; what it finds is of one that was killed, and may have read other texts.
    """
    if not ranks.is_main() or stage.settings.summarize == "off":
        return {}
    parts = _parts(stage)
    found = by_user(_rows(parts)) if ranks.is_launched() else {}
    _drop(parts)
    return found


def _rows(parts: Iterable[Path]) -> Iterator[list[str]]:
    for part in parts:
        with suppress(UserError):  # another run has dropped it, taking it for a killed one's; the store has it all
            yield from (values for _, values in read_values(part))


def _parts(stage: Stage) -> list[Path]:
    path = usum_file(stage.folder, stage.tag)
    mine = re.compile(re.escape(path.name) + r"\.rank\d+")
    return sorted(part for part in path.parent.iterdir() if mine.fullmatch(part.name))


def _drop(paths: Iterable[Path]) -> None:
    for path in paths:
        remove_file(path)


def _beginning(plan: Plan, name: str, settings: SummarySettings) -> str:
    """Return what decides who writes a history's chain: the items it starts with, as other chains may start so too."""
    first, most = 0, settings.max_history
    if most is not None and plan.positions[name]:
        first = max(0, min(plan.positions[name]) - most)
    return "\n".join(plan.histories[name][first : first + settings.block_size])


@contextmanager
def _led(make: MakeScribe) -> Iterator[MakeScribe]:
    """Yield `make` with one model (`one_model`); if that is split, no process is led through it afterwards."""
    with one_model(make) as shared:
        yield shared
        ranks.before_meeting(None)
