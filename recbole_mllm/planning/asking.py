"""The recommender's stages, counted: SFT on real batches, validation and test on the real frozen candidates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION
from recbole_mllm.data.training import SeededTrainDataLoader
from recbole_mllm.mllm.encode import Encoded
from recbole_mllm.mllm.forward import _FEATURE_BYTES as FEATURE_BYTES
from recbole_mllm.mllm.passes import Pass, scoring_passes, training_passes
from recbole_mllm.mllm.sft import make_examples
from recbole_mllm.model.questions import deals_by_item, question, shares_in_training
from recbole_mllm.model.team import _AHEAD as AHEAD
from recbole_mllm.planning.counts import Count
from recbole_mllm.planning.flops import backward_flops, head_flops, read_flops
from recbole_mllm.planning.pairs import Pairs, Row
from recbole_mllm.planning.prepared import Prepared
from recbole_mllm.planning.readers import LocalReader, Reader
from recbole_mllm.prompts import Prompt
from recbole_mllm.summaries.prepare import Preferences

_TOKENS = 4e6  # of a stage's prompts that are looked at one by one: prompts with images are long
_SCORED = 2  # logits a scored pair needs, of Yes and of No; the rest of the vocabulary is not computed


@dataclass(slots=True)
class Images:
    """How often images are read: once a run where the tower is `frozen` and all features fit into the cache.

    `bytes_each` is what one image's features take.
    """

    frozen: bool
    bytes_each: float = 0.0
    seen: set[int] = field(default_factory=set)

    def counted(self, count: Count, p: Prepared, items: Any, times: int, *, by_item: bool = True) -> Count:
        """Return `count`, of `times` rounds over `items` (internal ids), with the images that are really read.

        Args:
            count: With an image for each pass that needs it.
            p: The run.
            items: What is asked about.
            times: Rounds.
            by_item: Whether all questions about one item stand together.
        """
        if not self.frozen or not count.images:
            return count
        images = p.stage.items.images
        shown = {i for i in np.asarray(items).tolist() if str(p.items[i]) in images}
        if self.bytes_each * len(self.seen | shown) <= FEATURE_BYTES:
            read: float = len(shown - self.seen)
        else:
            read = len(shown) * times if by_item else count.images
        self.seen |= shown
        count.vision_flops *= read / count.images
        count.images = read
        return count


@dataclass(slots=True)
class Asking:
    """Counts what the recommender is asked.

    Args:
        p: The run.
        reader: Counts tokens; with a model of this process, also passes.
        preferences: What stands for each user, written or not.
        trained: Parameters that are trained.
        limit: Prompts of a stage above which a sample is counted.
        images: How often images are read.
    """

    p: Prepared
    reader: Reader
    preferences: Preferences
    trained: int
    limit: int
    images: Images
    sampled: set[str] = field(default_factory=set)

    def prompts(self, rows: Iterable[Row]) -> list[Prompt]:
        """Return the question of each (history, position, item), by number."""
        p, style, of = self.p, self.p.stage.style, self.preferences.of
        return [
            question(style, p.settings.recommend, p.stage.items, of(p.history_names.name(h), at), str(p.items[i]))
            for h, at, i in rows
        ]

    def score(self, name: str, pairs: Pairs, times: int = 1) -> Count:
        """Return the cost of scoring `pairs` that many times."""
        count = Count()
        for start in self._starts(name, pairs):
            count.add(self.scored(self.prompts(pairs.span(start, start + AHEAD))))
        count = count.times(times * pairs.total / max(1.0, count.prompts))
        return self.images.counted(count, self.p, pairs.items(), times)

    def scored(self, prompts: Sequence[Prompt]) -> Count:
        """Return the cost of scoring `prompts` in one call."""
        count = Count()
        if not isinstance(self.reader, LocalReader):
            for prompt in prompts:
                count.add(self.reader.written(prompt, 1))
            return count
        plan = self.reader.blueprint
        encoded = [plan.encoder(prompt) for prompt in prompts]
        passes = scoring_passes(plan.body, encoded, share=self.p.settings.train.share_prefix == "auto")
        self._read(count, encoded, passes)
        count.head_flops = 2.0 * plan.anatomy.width * _SCORED * len(prompts)
        return count

    def train(self, epochs: int) -> Count:
        """Return the cost of all epochs, by the batches of the first one: all of them or the first ones."""
        loader = SeededTrainDataLoader.of(self.p.loaders["train"])
        assert isinstance(self.reader, LocalReader)
        loader.grouped = deals_by_item(self.p.settings, self.reader.blueprint.body)
        total = int(loader.sample_size * loader.times)
        count = Count()
        for rows, labels in self.batches(loader):
            count.add(self.batch(self.prompts(rows), labels))
            if count.prompts >= self.limit or count.tokens >= _TOKENS:
                break
        if count.prompts < total:
            self.sampled.add("sft")
        count = count.times(epochs * total / max(1.0, count.prompts))
        return self.images.counted(count, self.p, self._trained_items(), epochs, by_item=False)

    def batches(self, loader: Any) -> Iterator[tuple[list[Row], list[float]]]:
        """Yield the rows of each batch of the first epoch with their labels."""
        own, label = loader._dataset, self.p.config["LABEL_FIELD"]
        loader.set_epoch(0)
        for batch in loader:
            columns = (batch[f].tolist() for f in (HISTORY_NUMBER, POSITION, own.iid_field))
            yield list(zip(*columns, strict=True)), batch[label].tolist()

    def batch(self, prompts: Sequence[Prompt], labels: Sequence[float]) -> Count:
        """Return the cost of training on one batch."""
        assert isinstance(self.reader, LocalReader)
        plan, settings = self.reader.blueprint, self.p.settings
        answers = plan.answers(self.p.stage.style)
        told = [answers.yes if label else answers.no for label in labels]
        examples = make_examples([plan.encoder(prompt) for prompt in prompts], told)
        share = shares_in_training(settings, plan.body)
        back = training_passes(plan.body, examples, settings.train.micro_batch_size, share=share)
        passes = [one for part in back for one in part]
        count = Count()
        self._read(count, examples, passes)
        whole = settings.lora.finetune == "full"
        again = settings.train.gradient_checkpointing
        count.backward_flops = backward_flops(plan.anatomy, passes, self.trained, whole=whole, again=again)
        labelled = sum(len(e.ids) - 1 if settings.train.loss_on == "all" else e.answer for e in examples)
        count.head_flops = head_flops(plan.anatomy, labelled)
        count.backward_flops += count.head_flops * (2 if whole else 1)
        count.widest = max(sum(one.rows * one.width for one in part) for part in back)
        return count

    def _read(self, count: Count, encoded: Sequence[Encoded], passes: Sequence[Pass]) -> None:
        """Add what reading `encoded` in `passes` costs."""
        assert isinstance(self.reader, LocalReader)
        for one in encoded:
            count.add(self.reader.read(one))
        looked, shown = sum(one.images for one in passes), max(1.0, count.images)
        count.vision_flops, count.images = count.vision_flops / shown * looked, looked
        count.computed = sum(one.tokens for one in passes)
        count.prompt_flops = read_flops(self.reader.blueprint.anatomy, passes)
        count.widest = max((one.rows * (one.before + one.width) for one in passes), default=0)
        count.prefix = max((one.before for one in passes), default=0)
        count.at_once = max((one.rows * one.width for one in passes), default=0)

    def _trained_items(self) -> Any:
        """Return the items that occur in training, as targets or negatives."""
        own = self.p.loaders["train"]._dataset
        return np.unique(getattr(own, "whole_split", own.inter_feat)[own.iid_field].numpy())

    def _starts(self, name: str, pairs: Pairs) -> list[int]:
        """Return where the calls begin that are counted: all of them, or some evenly spread."""
        starts = list(range(0, pairs.total, AHEAD))
        each = self.reader.written(self.prompts(pairs.span(0, 1))[0], 1).tokens if starts else 0.0
        most = max(1, int(min(self.limit, _TOKENS / max(1.0, each))) // AHEAD)
        if len(starts) <= most:
            return starts
        self.sampled.add(name)
        return [starts[i] for i in np.linspace(0, len(starts) - 1, most).astype(int)]
