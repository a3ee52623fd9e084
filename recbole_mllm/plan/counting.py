"""Count a run before it starts: the walk of the run itself, with stand-in texts for what a model would write.

A model is read without its weights: config, tokenizer and processor say what its prompts become. ``summarize
--dry-run`` takes the same walk, with a model that answers a few prompts; nothing is written, no server is asked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from recbole.utils import init_seed
from torch import Tensor

from recbole_mllm.common import distributed
from recbole_mllm.common.config import check_keys
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import is_server, revision_of, source_of
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.common.settings import MLLMSettings, Settings
from recbole_mllm.data.dataloader import SeededTrainDataLoader
from recbole_mllm.data.images import image_digest
from recbole_mllm.data.sampling import hash64
from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION
from recbole_mllm.mllm.backbone import FEATURE_BYTES, Backbone
from recbole_mllm.mllm.encoder import Encoded, Encoder, ImageInput, answer_tokens
from recbole_mllm.mllm.hf import positions_of
from recbole_mllm.mllm.interface import Answer, Batch, Decoding, Work, Writer
from recbole_mllm.mllm.loading import dtype_of, load
from recbole_mllm.mllm.loss import groups, make_examples, micro_batches
from recbole_mllm.mllm.scoring import LEAST_GAIN, Trie
from recbole_mllm.model.row_scoring import deals_by_item, question, shares_in_training
from recbole_mllm.model.summarizers import make_summary_setup
from recbole_mllm.plan.cost import Count, ModelSizes, sizes_of, trained_parameters
from recbole_mllm.plan.plan_text import duration
from recbole_mllm.quick_start import read_and_split
from recbole_mllm.summaries.chains import steps
from recbole_mllm.summaries.controls import controlled
from recbole_mllm.summaries.generator import CachedGenerator, item_generator, user_generator
from recbole_mllm.summaries.item_summaries import summarize_items
from recbole_mllm.summaries.preferences import Preferences
from recbole_mllm.summaries.since import users_since
from recbole_mllm.summaries.store import ReadOnlyStore
from recbole_mllm.summaries.user_summaries import SummaryRequests, preferences

STAGES = ("items", "users", "sft", "valid", "test")
LIMIT = 20_000  # prompts of a stage that are all counted; beyond, a sample stands for them
CHARACTERS = 4  # of a token, where only a server has the tokenizer
_TRIED = 16  # prompts that a dry run has answered
_AT_A_TIME = 4096
_TOKENS = 4e6  # of a stage's prompts that are looked at one by one: prompts with images are long
_CALL = 1024  # pairs that are scored together
_PAIRS = 2**20  # pairs of a ranking of all items that are listed; those of the other rows are like them
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


# ---- prompts become tokens


@dataclass(slots=True)
class SizedEncoder(Encoder):
    """Preprocesses one image of each size: what an image becomes in tokens and patches follows from its size."""

    _known: dict[Any, ImageInput] = field(default_factory=dict)  # by size, and by path

    def image(self, path: Path) -> ImageInput:
        """Return what an image of this size becomes, under the key of this one."""
        if path not in self._known:
            with Image.open(path) as image:
                size = image.size[::-1] if image.getexif().get(_ORIENTATION) in _TURNED else image.size
            if size not in self._known:
                self._known[size] = Encoder.image(self, path)
            self._known[path] = replace(self._known[size], key=image_digest(path))
        return self._known[path]


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model without its weights: `body` is on the meta device, it has shapes and no numbers."""

    name: str
    body: Backbone
    encoder: Encoder
    sizes: ModelSizes

    @classmethod
    def of(cls, name: str, settings: MLLMSettings) -> Self:
        """Read the config, tokenizer and processor of `name`.

        Raises:
            UserError: One of them is neither on this disk nor to be had.
        """
        try:
            trusted = settings.trust_remote_code
            loaded = load(name, torch.float32, torch.device("meta"), trust_remote_code=trusted, weights=False)
        except UserError as error:
            at = f" --revision {revision}" if (revision := revision_of(name)) else ""
            raise UserError(
                f"{error}; a plan reads its config, tokenizer and processor files and no weights: "
                f"`hf download {source_of(name)}{at} --include '*.json' '*.jinja' '*.model' '*.txt'` fetches them"
            ) from error
        body = Backbone(loaded.model)
        limits = settings.max_text_tokens, body.architecture, positions_of(loaded.model.config)
        return cls(name, body, SizedEncoder(loaded.tokenizer, loaded.processor, *limits), sizes_of(loaded.model))

    def count_written(self, prompt: Prompt, new: float, room: int = 0) -> Count:
        """Return the count of answering `prompt` with `new` tokens, of up to `room` that the answer may have."""
        encoded = [self.encoder(prompt, room=room)]
        count, steps = self._listed(encoded), max(0.0, new - 1)
        count.add(self._pass(encoded))
        count.new_tokens, count.steps, count.logits = new, steps, new * self.sizes.vocabulary
        count.cache_reads = steps * (count.longest + new / 2)
        return count

    def count_scored(self, prompts: Sequence[Encoded], *, share: bool) -> Count:
        """Return the count of scoring `prompts` in one call, two logits each."""
        trie = _CountedTrie(self, prompts)
        trie.score(share=share and self.body.architecture.shares_prefix)
        trie.count.add(self._listed(prompts))
        trie.count.logits = 2 * len(prompts)
        return trie.count

    def count_trained(self, examples: Sequence[Encoded], micro: int | None, *, share: bool) -> Count:
        """Return the count of one batch of training, there; `cost.flops` adds the way back."""
        count = self._listed(examples)
        for part in micro_batches(self.body, examples, micro, share=share):
            rows, held = [examples[i] for i in part], 0
            for group in groups(self.body, rows, share=share):
                members = [rows[i] for i in group.rows]
                shared = [self._pass(members[:1], 0, group.shared)] if group.shared else []
                for one in (*shared, self._pass(members, group.shared)):
                    count.add(one)
                    held += one.at_once
            count.widest = max(count.widest, held)
        return count

    def _listed(self, prompts: Sequence[Encoded]) -> Count:
        lengths = [len(prompt.ids) for prompt in prompts]
        shown = sum(len(image.ids) for prompt in prompts for image in prompt.images)
        return Count(len(prompts), text_tokens=sum(lengths) - shown, image_tokens=shown, longest=max(lengths))

    def _pass(self, prompts: Sequence[Encoded], start: int = 0, stop: int | None = None) -> Count:
        """Return the count of one pass over the tokens from `start` to `stop` (None: the end) of each of `prompts`."""
        stops, mark = [stop or len(prompt.ids) for prompt in prompts], self.body.image_token_id
        images = [image for prompt in prompts if mark in prompt.ids[start:stop] for image in prompt.images]
        return Count(
            computed=sum(end - start for end in stops),
            attended=sum((end - start) * end for end in stops),
            images=len(images),
            vision_flops=sum(self.sizes.image_flops(image.tensors, len(image.ids)) for image in images),
            at_once=len(prompts) * (max(stops) - start),
        )


class _CountedTrie(Trie):
    """Counts the passes of scoring where `Trie` makes them: a shared prefix, and a batch behind it."""

    def __init__(self, model: PlannedModel, prompts: Sequence[Encoded]) -> None:
        super().__init__(model.body, prompts, (), str, LEAST_GAIN)
        self.model, self.count = model, Count()

    def _read(self, row: int, depth: int, stop: int, parent: Any) -> Any:
        self.count.add(self.model._pass([self.prompts[row]], depth, stop))
        self.count.prefix = max(self.count.prefix, stop)
        return parent or self.model.body.new_cache()

    def _scored(self, batch: Sequence[int], depth: int, cache: Any) -> Tensor:
        self.count.add(self.model._pass([self.prompts[i] for i in batch], depth))
        self.count.widest = max(self.count.widest, len(batch) * max(len(self.keys[i]) for i in batch))
        return torch.empty(len(batch), 0)


def tokens(model: PlannedModel | None, text: str) -> int:
    """Return how many tokens `text` has by itself; of a server's model (None) they are guessed."""
    if model is None:
        return -(-len(text) // CHARACTERS)
    return len(model.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])


def written(model: PlannedModel | None, prompt: Prompt, new: float, room: int = 0) -> Count:
    """Return the count of answering `prompt`; of a server's model (None) text tokens are guessed, images not known."""
    if model is not None:
        return model.count_written(prompt, new, room)
    text, images = tokens(None, prompt.text), len(prompt.images)
    return Count(1, text_tokens=text, new_tokens=new, computed=text, images=images, longest=text)


# ---- texts nobody has written yet


@dataclass(frozen=True, slots=True)
class StandIns:
    """Texts in place of answers, the same for the same name: `length` of `words`, taken to have `tokens` tokens.

    They differ from each other as answers do: equal texts would make prompts share more than they will.
    """

    words: Sequence[str]
    length: float
    tokens: float

    @classmethod
    def like(cls, samples: Sequence[tuple[str, int]]) -> Self:
        """Return stand-ins as long as the `samples`, texts with their tokens, and of their words."""
        words = [word for text, _ in samples for word in text.split()]
        return cls(words, len(words) / len(samples), sum(new for _, new in samples) / len(samples))

    def of(self, *name: object) -> str:
        """Return the text that stands for `name`."""
        return " ".join(random.Random(hash64("stand-in", *name)).choices(self.words, k=round(self.length)))


class StandInTexts(dict[Any, str]):
    """Texts that are known, and a stand-in for each that is not."""

    def __init__(self, known: Mapping[Any, str], stand_ins: StandIns) -> None:
        super().__init__(known)
        self.stand_ins = stand_ins

    def __missing__(self, name: Any) -> str:
        return self.stand_ins.of(name)

    def get(self, name: Any, default: Any = None) -> Any:
        """Return the text of `name`, or its stand-in; `default` is not needed."""
        return self[name]


@dataclass(slots=True)
class StandInWriter:
    """A `Writer` that counts its prompts: a model answers the first few, if there is one to `load`, stand-ins the rest.

    Prompts with another `decoding` are not counted: they are a second try at one that its stand-in repeats. `tried` are
    the model's answers, which took `seconds`.
    """

    model: PlannedModel | None
    stand_ins: StandIns
    decoding: Decoding
    load: Callable[[], Writer] | None = None
    identity: str = "plan"
    count: Count = field(default_factory=Count)
    tried: dict[int, Answer] = field(default_factory=dict)
    seconds: float = 0.0

    def write(self, work: Work) -> None:
        """Answer every prompt.

        Raises:
            UserError: The model answers none of the first prompts.
        """
        while asks := work.take(_AT_A_TIME if self.tried or self.load is None else _TRIED):
            answers: Mapping[int, Answer] = {}
            if not self.tried and self.load is not None:
                answers = self.tried = self._try(self.load(), [ask.prompt for ask in asks], asks[0].decoding)
                self.stand_ins = StandIns.like([(answer.text, answer.new_tokens) for answer in answers.values()])
            for place, ask in enumerate(asks):
                if ask.decoding == self.decoding:
                    self.count.add(written(self.model, ask.prompt, self.stand_ins.tokens, ask.decoding.max_new_tokens))
                text = self.stand_ins.of(ask.prompt.marked, *(path.name for path in ask.prompt.images))
                stand_in = Answer(text, 0, round(self.stand_ins.tokens))
                work.give([(ask.place, answers.get(place, stand_in))])

    def _try(self, model: Writer, prompts: Sequence[Prompt], decoding: Decoding) -> dict[int, Answer]:
        batch, started = Batch(prompts, decoding), time.perf_counter()
        model.write(batch)
        self.seconds = time.perf_counter() - started
        if not batch.answers:  # nothing to judge the others by
            reason = batch.failures.get(0, "no answer")
            raise UserError(f"{self.identity} answered none of the first {len(prompts)} prompts ({reason})")
        return batch.answers


# ---- the run


class PlannedRun:
    """A run that has not begun: its rows, candidates, titles and wording, and each stage's model without its weights.

    Args:
        config: RecBole's Config of the run.
        device: The kind of device it would run on.
        limit: Prompts of a stage above which a sample is counted.
        since: Only the summaries of users who are active since are counted (`users_since`).

    Raises:
        UserError: The configuration is not what it should be.
    """

    def __init__(self, config: Any, device: torch.device, limit: int = LIMIT, since: str | None = None) -> None:
        config["show_progress"], config["state"] = False, "ERROR"
        self.config, self.device, self.limit = config, device, limit
        self.settings = Settings.from_config(config)
        self.settings.ranking.check_modes(config["eval_args"]["mode"])
        init_seed(config["seed"], config["reproducibility"])  # as a run: a random split draws from it
        check_keys(config.external_config_dict, "the configuration")
        dataset, loaders = read_and_split(config)
        self.setup = make_summary_setup(config, self.settings, device)
        self.loaders = dict(zip(("train", "valid", "test"), loaders, strict=True))
        self.train = own = loaders[0]._dataset
        self.requests = controlled(SummaryRequests(own.histories, own.positions), self.settings.summary)
        if since is not None:
            self.requests = self.requests.of(users_since(dataset, since))
        self.items = np.asarray(own.field2id_token[own.iid_field]).astype(str)  # raw ids by internal ones
        m, is_trained = self.settings.mllm, self.settings.lora.finetune != "none"
        self.item_bytes = dtype_of(m.dtype, device).itemsize
        self.names = dict.fromkeys(STAGES, m.source("mllm"))
        self.names |= {"items": m.source("item_summarizer"), "users": m.source("user_summarizer")}
        self.epochs = int(config["epochs"]) if is_trained else 0
        step = min(int(config["eval_step"]), self.epochs)
        self.validations = self.epochs // step if step > 0 else int(not is_trained)  # early stopping aside
        self._models: dict[str, PlannedModel | None] = {}
        self._images_read: set[int] = set()

    def model(self, stage: str) -> PlannedModel | None:
        """Return the model of a `stage`, None of a server's.

        Raises:
            UserError: It cannot be read (`PlannedModel.of`).
        """
        name = self.names[stage]
        if name not in self._models:
            self._models[name] = None if is_server(name) else PlannedModel.of(name, self.settings.mllm)
        return self._models[name]

    @cached_property
    def trained(self) -> int:
        """How many parameters are trained."""
        model = self.model("sft")
        return trained_parameters(model.body.model, self.settings.lora) if model is not None else 0

    def questions(self, summaries: Preferences, rows: Iterable[Sequence[int]]) -> list[Prompt]:
        """Return the question of each (item, history, position), by number."""
        name, style, settings = self.train.history_names.name, self.setup.style, self.settings.recommend
        return [
            question(style, settings, self.setup.items, summaries.of(name(history), at), str(self.items[item]))
            for item, history, at in rows
        ]

    def with_images(self, count: Count, items: Any) -> Count:
        """Return `count`, of questions about internal ids `items`, with the images that are really read.

        A frozen tower reads an image once a run where all features fit into the cache, else for each pass over it.
        """
        model, lora, images = self.model("sft"), self.settings.lora, self.setup.items.images
        if model is None or not count.images or (lora.finetune != "none" and lora.lora_target == "all"):
            return count
        new = {i for i in items.tolist() if str(self.items[i]) in images} - self._images_read
        self._images_read |= new
        each = len(model.encoder.image(next(iter(images.values()))).ids) * model.sizes.width * self.item_bytes
        if each * len(self._images_read) <= FEATURE_BYTES:
            count.vision_flops *= len(new) / count.images
            count.images = len(new)
        return count


# ---- summaries


@dataclass(frozen=True, slots=True)
class CountedSummaries:
    """The summaries of a stage, counted.

    Args:
        count: Of those to write.
        asked: How many there are, those in the store included.
        texts: Of all, written or not.
        name_bytes: What the id in a row of the exported file takes.
        chain: How many of one user wait for one another, at most.
        assumed: Whether their length is only known from its limit.
        writer: What has counted them.
    """

    count: Count
    asked: int
    texts: StandInTexts
    name_bytes: float
    chain: int
    assumed: bool
    writer: StandInWriter

    @property
    def text_bytes(self) -> float:
        """What a text takes in UTF-8."""
        return sum(len(text.encode()) for text in self.texts.values()) / max(1, len(self.texts))


def count_summaries(run: PlannedRun, which: str = "all", *, tried: bool = False) -> dict[str, CountedSummaries]:
    """Count the item summaries that some user summary reads, and (unless `which` is ``items``) the user summaries.

    Above the run's limit a sample of items, or of users, is walked. With `tried` the models of this machine are loaded
    and answer the first prompts; what a killed run of several processes has left unmerged is known as well.
    """
    s, setup, requests = run.settings.summary, run.setup, run.requests
    style, items = setup.style, setup.items
    with closing(ReadOnlyStore(setup.folder)) as known:

        def counted(
            stage: str,
            generator: CachedGenerator,
            sizes: Mapping[str, int],
            chain: int,
            write: Callable[[list[str]], Mapping[Any, str]],
        ) -> CountedSummaries:
            chosen, total = _sampled(sizes, run.limit), sum(sizes.values())
            share = sum(sizes[name] for name in chosen) / max(1, total)
            model, most = run.model(stage) if sizes else None, generator.decoding.max_new_tokens
            samples = known.samples(generator.kind, generator.identity)
            words = " ".join(items.titles.values()).split()[:_AT_A_TIME] or ["word"]
            each = max(1.0, tokens(model, " ".join(words)) / len(words))
            stand_ins = StandIns.like(samples) if samples else StandIns(words, max(1, (most - 1) / each), most)
            load = generator.load if tried and not is_server(run.names[stage]) else None
            writer = StandInWriter(model, stand_ins, generator.decoding, load, generator.identity)
            generator.write_alone(lambda: writer)
            generator.may_write = True
            texts = StandInTexts(write(chosen), writer.stand_ins)
            writer.count.known, writer.count.sampled = generator.tally.known, len(chosen) < len(sizes)
            names = sum(len(name.encode()) for name in chosen) / max(1, len(chosen))
            count = writer.count.times(1 / share) if share else writer.count
            return CountedSummaries(count, total, texts, names, chain, not samples, writer)

        generator = item_generator(setup, known)
        wanted = requests.items(s) if s.summary_mode != "none" and s.item_summary != "none" else []
        found = {
            "items": counted(
                "items",
                generator,
                dict.fromkeys(wanted, 1),
                1,
                lambda chosen: summarize_items(generator, style, items, chosen, s.item_summary),
            )
        }
        if which == "items":
            return found
        texts = found["items"].texts if s.item_summary != "none" else {}
        of_users = user_generator(setup, known)
        states = requests.states(s) if s.summary_mode != "none" else {}
        chains = {name: steps(own, s) for name, own in states.items()}
        found["users"] = counted(
            "users",
            of_users,
            {name: sum(map(len, levels)) for name, levels in chains.items()},
            max(map(len, chains.values()), default=0) if s.summary_mode == "recurrent" else 1,
            lambda chosen: preferences(of_users, style, items, texts, requests.reading(chosen), s),
        )
        return found


def _sampled(sizes: Mapping[str, int], limit: int) -> list[str]:
    """Return all names, or some drawn by hash until their `sizes` reach `limit`."""
    if sum(sizes.values()) <= limit:
        return list(sizes)
    order = sorted(sizes, key=lambda name: hash64("plan", name))
    return order[: int(np.searchsorted(np.cumsum([sizes[name] for name in order]), limit)) + 1]


# ---- training and scoring


def count_training(run: PlannedRun, summaries: Preferences) -> Count:
    """Return the count of all epochs, by the batches of the first one: all of them or the first ones."""
    count, model, train = Count(), run.model("sft"), run.settings.train
    if not run.epochs or model is None:
        return count
    may_share = not train.gradient_checkpointing  # which computes layers again, without a cache
    grouped = may_share and deals_by_item(run.settings, model.body)
    loader = SeededTrainDataLoader.of(run.loaders["train"], grouped)
    loader.set_epoch(0)
    share = may_share and shares_in_training(run.settings, model.body)
    own, style = loader._dataset, run.setup.style
    yes_no = answer_tokens(model.encoder, style.answer_yes, style.answer_no)
    for batch in loader:
        columns = (batch[name].tolist() for name in (own.iid_field, HISTORY_NUMBER, POSITION))
        prompts = run.questions(summaries, zip(*columns, strict=True))
        answers = [yes_no.yes if label else yes_no.no for label in batch[run.config["LABEL_FIELD"]].tolist()]
        examples = make_examples([model.encoder(prompt) for prompt in prompts], answers)
        one = model.count_trained(examples, train.micro_batch_size, share=share)
        labelled = sum(len(e.ids) - 1 if train.loss_on == "all" else e.answer for e in examples)
        one.logits = labelled * model.sizes.vocabulary
        count.add(one)
        if count.prompts >= run.limit or count.tokens >= _TOKENS:
            break
    total = int(loader.sample_size * loader.times)
    count.sampled = count.prompts < total
    items = np.unique(getattr(own, "whole_split", own.inter_feat)[own.iid_field].numpy())
    return run.with_images(count.times(run.epochs * total / max(1, count.prompts)), items)


def count_scoring(run: PlannedRun, summaries: Preferences, phase: str) -> Count:
    """Return the count of all validations (``valid``), or of the test: all pairs, or calls evenly spread over them."""
    times, count, model = run.validations if phase == "valid" else 1, Count(), run.model(phase)
    rows, total = pairs_of(run, phase)
    if not times or not total:
        return count
    starts = np.arange(0, len(rows), _CALL)
    each = written(model, run.questions(summaries, rows[:1].tolist())[0], 1).tokens
    most = max(1, int(min(run.limit, _TOKENS / max(1.0, each))) // _CALL)
    for start in starts[np.linspace(0, len(starts) - 1, min(most, len(starts))).astype(int)]:
        prompts = run.questions(summaries, rows[start : start + _CALL].tolist())
        if model is None:
            for prompt in prompts:
                count.add(written(None, prompt, 1))
        else:
            share = run.settings.train.share_prefix == "auto"
            count.add(model.count_scored([model.encoder(prompt) for prompt in prompts], share=share))
    count.sampled = count.prompts < total
    return run.with_images(count.times(times * total / count.prompts), np.unique(rows[:, 0]))


def pairs_of(run: PlannedRun, phase: str) -> tuple[Any, int]:
    """Return the pairs an evaluation scores, ``[N, 3]`` of item, history and position, item by item; and their number.

    Of a ranking of all items the first rows' pairs are returned. What a retriever that is not trained yet would put
    first is not known: items drawn by popularity stand for it.
    """
    loader, ranking = run.loaders[phase], run.settings.ranking
    part = loader._dataset
    histories, places, targets = (part.inter_feat[f].numpy() for f in (HISTORY_NUMBER, POSITION, part.iid_field))
    rows, items, batch = len(targets), int(part.item_num) - 1, len(targets)
    if hasattr(loader, "negatives"):
        own = np.r_[np.arange(rows), np.repeat(np.arange(rows), loader.count)]
        shown, total = np.r_[targets, loader.negatives], len(own)
    elif ranking.full_sort == "brute":
        own = np.repeat(np.arange(min(rows, max(1, _PAIRS // items))), items)
        shown, total = np.tile(np.arange(1, items + 1), len(own) // items), rows * items
        batch = int(loader.batch_size or 1)  # whose rows are scored item by item
    else:
        top = min(ranking.top_k, items)
        own, total = np.repeat(np.arange(rows), top), rows * top
        met = run.train.inter_feat[run.train.iid_field].numpy()
        counts = np.bincount(met, minlength=items + 1)[1:] + 0.1
        shown = 1 + np.random.default_rng(run.config["seed"]).choice(items, total, p=counts / counts.sum())
    order = np.lexsort((places[own], histories[own], shown, own // max(1, batch)))
    return np.c_[shown, histories[own], places[own]][order], total


# ---- a dry run


def dry_run(config: Any, which: str, since: str | None = None) -> list[str]:
    """Return, a line a stage, what summarising ``items``, ``users`` or ``all`` for a run of `config` would take.

    Of users active `since` alone, if given. The model answers a few prompts; nothing is written.

    Raises:
        UserError: The model is split among processes, or answers none of the first prompts.
    """
    run = PlannedRun(config, config["device"], since=since)
    if run.setup.who.item_is_split or run.setup.who.user_is_split:
        raise UserError(
            "--dry-run lets one process try the model, which does not work with one that is split among several; "
            "start it without FSDP, or see what `plan` counts"
        )

    def lines() -> list[str]:
        found = count_summaries(run, which, tried=True)
        return [_line(stage, one) for stage, one in found.items() if one.asked or stage == "items"]

    return distributed.on_main(lines)


def _line(stage: str, found: CountedSummaries) -> str:
    """Return the counts of a dry run and what they would take, for people."""
    count, writer = found.count, found.writer
    about = "about " if count.sampled else ""
    head = f"{stage.removesuffix('s')} summaries: {found.asked:,} prompts, {about}{round(count.known):,} known"
    if not count.prompts:
        return f"{head}, nothing to write"
    head += f", {about}{round(count.prompts):,} to write"
    if writer.load is None:
        return (
            f"{head}, by {writer.identity}: about {count.text_tokens:,.0f} tokens of text to read, {CHARACTERS} "
            "characters each; its images, price and time are not known, as a dry run sends nothing to a server"
        )
    seconds = writer.seconds * count.prompts / len(writer.tried)
    return (
        f"{head}: about {count.tokens:,.0f} tokens to read and {count.new_tokens:,.0f} to write, about "
        f"{duration(seconds)} (probe: {len(writer.tried)} prompts in {writer.seconds:.1f} s)"
    )
