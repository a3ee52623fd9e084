"""Count a run before it starts: the walk of the run itself, with stand-in texts for what a model would write.

A model is read without its weights: config, tokenizer and processor say what its prompts become. ``summarize
--dry-run`` takes the same walk, with a model that answers a few prompts; nothing is written, no server is asked.
"""

from __future__ import annotations

import os.path
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
from PIL import Image
from recbole.utils import init_seed

from recbole_mllm.common import distributed
from recbole_mllm.common.config import check_keys
from recbole_mllm.common.endpoints import is_server
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.common.settings import MLLMSettings, Settings
from recbole_mllm.data.dataloader import SeededTrainDataLoader
from recbole_mllm.data.images import image_digest
from recbole_mllm.data.sampling import hash64
from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION
from recbole_mllm.mllm.backbone import Backbone
from recbole_mllm.mllm.encoder import Encoded, Encoder, ImageInput, answer_tokens
from recbole_mllm.mllm.hf import positions_of
from recbole_mllm.mllm.interface import Answer, Ask, Batch, Decoding, Work, Writer
from recbole_mllm.mllm.loading import dtype_of, load
from recbole_mllm.mllm.loss import SharedPrefix, groups, make_examples, micro_batches
from recbole_mllm.mllm.scoring import input_key
from recbole_mllm.model.row_scoring import deals_by_item, question, shares_in_training
from recbole_mllm.model.summarizers import make_summary_setup
from recbole_mllm.plan.cost import Count, ModelSizes, sizes_of, trained_parameters
from recbole_mllm.plan.plan_text import duration
from recbole_mllm.quick_start import read_and_split
from recbole_mllm.summaries.chains import steps
from recbole_mllm.summaries.generator import CachedGenerator, SummarySetup, item_generator, user_generator
from recbole_mllm.summaries.item_summaries import summarize_items
from recbole_mllm.summaries.preferences import Preferences
from recbole_mllm.summaries.since import users_since
from recbole_mllm.summaries.store import ReadOnlyStore, Store
from recbole_mllm.summaries.user_summaries import SummaryRequests, preferences

CHARACTERS = 4  # of a token, where only a server has the tokenizer
_TRIED = 16  # prompts that a dry run has answered
_AT_A_TIME = 4096
_TOKENS = 4e6  # of a stage's prompts that are looked at one by one: prompts with images are long
_CALL = 1024  # pairs that are scored together
LEAST_GAIN = 512  # tokens that sharing a prefix must save there, as `mllm.scoring` has it
_PAIRS = 2**20  # pairs of a ranking of all items that are listed; those of the other rows are like them
FEATURE_BYTES = 2**31  # of images' features that a run holds
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


# ---- prompts become tokens


@dataclass(slots=True)
class SizedEncoder(Encoder):
    """Preprocesses one image of each size: what an image becomes in tokens and patches follows from its size."""

    _by_size: dict[tuple[int, int], ImageInput] = field(default_factory=dict)
    _by_path: dict[Path, ImageInput] = field(default_factory=dict)

    def image(self, path: Path) -> ImageInput:
        """Return what an image of this size becomes, under the key of this one."""
        if path not in self._by_path:
            with Image.open(path) as image:
                turned = image.getexif().get(_ORIENTATION, 1) in _TURNED
                size = image.size[::-1] if turned else image.size
            if size not in self._by_size:
                self._by_size[size] = Encoder.image(self, path)
            self._by_path[path] = replace(self._by_size[size], key=image_digest(path))
        return self._by_path[path]


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
            raise UserError(
                f"{error}; a plan reads its config, tokenizer and processor files and no weights: "
                f"`hf download {name} --include '*.json' '*.jinja' '*.model' '*.txt'` fetches them"
            ) from error
        body = Backbone(loaded.model)
        limits = settings.max_text_tokens, body.architecture, positions_of(loaded.model.config)
        return cls(name, body, SizedEncoder(loaded.tokenizer, loaded.processor, *limits), sizes_of(loaded.model))

    def written(self, prompt: Prompt, new: float, room: int = 0) -> Count:
        """Return the count of answering `prompt` with `new` tokens, of up to `room` that the answer may have."""
        encoded = self.encoder(prompt, room=room)
        count, steps = self.read([encoded], [[SharedPrefix((0,), 0)]]), max(0.0, new - 1)
        count.new_tokens, count.steps, count.logits = new, steps, new * self.sizes.vocabulary
        count.cache_reads = steps * (count.longest + new / 2)
        return count

    def read(
        self, prompts: Sequence[Encoded], parts: Iterable[Sequence[SharedPrefix]], most: int | None = None
    ) -> Count:
        """Return the count of reading `prompts` in passes that compute what each group shares once.

        Args:
            prompts: Each is read once.
            parts: Groups of prompts by their places; those of one part are held at once.
            most: Tokens that one pass holds at most; None: a part is one pass there and back, whatever it holds.
        """
        images = [image for prompt in prompts for image in prompt.images]
        shown, lengths = sum(len(image.ids) for image in images), [len(prompt.ids) for prompt in prompts]
        count = Count(len(prompts), 0, sum(lengths) - shown, shown, longest=max(lengths, default=0))
        for part in parts:
            held = 0
            for group in part:
                rows, shared = [lengths[i] for i in group.rows], group.shared
                width = max(rows)
                together = min(len(rows), max(1, most // width)) if most else len(rows)
                count.computed += shared + sum(length - shared for length in rows)
                count.attended += shared**2 + sum((length - shared) * length for length in rows)
                count.images += sum(len(prompts[i].images) for i in (group.rows[:1] if shared else group.rows))
                held += shared + len(rows) * (width - shared)
                count.prefix = max(count.prefix, shared)
                count.at_once = max(count.at_once, shared, together * (width - shared))
                count.widest = max(count.widest, together * width if most else held)
        sized = {id(image.tensors): image for image in images}  # those of one size share their tensors
        each = {key: self.sizes.image_flops(image.tensors, len(image.ids)) for key, image in sized.items()}
        vision = sum(each[id(image.tensors)] for image in images)
        count.vision_flops = vision / max(1, len(images)) * count.images
        return count


def tokens(model: PlannedModel | None, text: str) -> int:
    """Return how many tokens `text` has by itself; of a server's model (None) they are guessed."""
    if model is None:
        return -(-len(text) // CHARACTERS)
    return len(model.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])


def written(model: PlannedModel | None, prompt: Prompt, new: float, room: int = 0) -> Count:
    """Return the count of answering `prompt`; of a server's model (None) text tokens are guessed, images not known."""
    if model is not None:
        return model.written(prompt, new, room)
    text, images = tokens(model, prompt.text), len(prompt.images)
    return Count(1, 0, text, new_tokens=new, computed=text, images=images, longest=text)


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

    `count` and `characters` are those of prompts with `decoding`: another one is a second try at a prompt that its
    stand-in repeats. `tried` are the model's answers, to prompts of `tried_characters`, which took `seconds`.
    """

    model: PlannedModel | None
    stand_ins: StandIns
    decoding: Decoding
    load: Callable[[], Writer] | None = None
    identity: str = "plan"
    count: Count = field(default_factory=Count)
    characters: int = 0
    tried: list[Answer] = field(default_factory=list)
    tried_characters: int = 0
    seconds: float = 0.0

    def write(self, work: Work) -> None:
        """Answer every prompt.

        Raises:
            UserError: The model answers none of the first prompts.
        """
        if self.load is not None and (asks := work.take(max(0, _TRIED - len(self.tried)))):
            self._try(self.load(), asks, work)
        while asks := work.take(_AT_A_TIME):
            self._add(asks)
            names = {ask.place: (ask.prompt.marked, *(path.name for path in ask.prompt.images)) for ask in asks}
            new = round(self.stand_ins.tokens)
            work.give([(place, Answer(self.stand_ins.of(*name), 0, new)) for place, name in names.items()])

    def _try(self, model: Writer, asks: Sequence[Ask], work: Work) -> None:
        batch = Batch([ask.prompt for ask in asks], asks[0].decoding)
        started = time.perf_counter()
        model.write(batch)
        self.seconds += time.perf_counter() - started
        self.tried += batch.answers.values()
        self.tried_characters += sum(len(asks[place].prompt.text) for place in batch.answers)
        if not self.tried:  # nothing to judge the others by
            reason = batch.failures.get(0, "no answer")
            raise UserError(f"{self.identity} answered none of the first {len(asks)} prompts ({reason})")
        self.stand_ins = StandIns.like([(answer.text, answer.new_tokens) for answer in self.tried])
        self._add(asks)
        for place, ask in enumerate(asks):
            if place in batch.answers:
                work.give([(ask.place, batch.answers[place])])
            else:
                work.fail(ask.place, batch.failures.get(place, "no answer"))

    def _add(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            if ask.decoding == self.decoding:
                self.count.add(written(self.model, ask.prompt, self.stand_ins.tokens, ask.decoding.max_new_tokens))
                self.characters += len(ask.prompt.text)


# ---- the run


def _prepared(config: Any, device: torch.device) -> tuple[Settings, SummarySetup, Any, dict[str, Any]]:
    """Return the settings, who summarises what, the dataset and its loaders, as a run of `config` has them."""
    config["show_progress"], config["state"] = False, "ERROR"
    settings = Settings.from_config(config)
    init_seed(config["seed"], config["reproducibility"])  # as a run: a random split draws from it
    check_keys(config.external_config_dict, "the configuration")
    dataset, loaders = read_and_split(config)
    setup = make_summary_setup(config, settings, device)
    return settings, setup, dataset, dict(zip(("train", "valid", "test"), loaders, strict=True))


STAGES = ("items", "users", "sft", "valid", "test")


@dataclass(slots=True)
class PlannedRun:
    """A run that has not begun: rows, candidates, titles and wording, and each stage's model without its weights.

    Args:
        config: RecBole's Config; `settings` what it says of MLLMMSR, `setup` where and how summaries are written.
        requests: The histories, and the positions that rows have in them; `histories` names their numbers.
        loaders: ``train``, ``valid`` and ``test``; `items` are the raw ids by the internal ones.
        names: Of each stage's model; in `models` None is a server's. They would run on a `device` of this kind.
        item_bytes: Of one of their numbers.
        rounds: The epochs and the validations, early stopping aside; a zero-shot model is validated once.
        trained: How many parameters are trained.
        limit: Prompts of a stage above which a sample is counted; `sampled` are those stages.
    """

    config: Any
    settings: Settings
    setup: SummarySetup
    requests: SummaryRequests
    loaders: dict[str, Any]
    histories: Any
    items: Any
    names: dict[str, str]
    models: dict[str, PlannedModel | None]
    device: torch.device
    item_bytes: int
    rounds: tuple[int, int]
    trained: int
    limit: int
    sampled: set[str] = field(default_factory=set)
    _images_read: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, config: Any, device: torch.device, limit: int) -> Self:
        """Read the dataset, split it and draw its candidates, as a run of `config` on such a `device` does.

        Raises:
            UserError: The configuration or a model is not what it should be.
        """
        settings, setup, _, loaders = _prepared(config, device)
        settings.ranking.check_modes(config["eval_args"]["mode"])
        own, m, is_trained = loaders["train"]._dataset, settings.mllm, settings.lora.finetune != "none"
        names = dict.fromkeys(STAGES, m.mllm)
        names |= {"items": m.item_summarizer or m.mllm, "users": m.user_summarizer or m.mllm}
        models = {name: None if is_server(name) else PlannedModel.of(name, m) for name in dict.fromkeys(names.values())}
        recommender = models[m.mllm]
        epochs = int(config["epochs"]) if is_trained else 0
        step = min(int(config["eval_step"]), epochs)
        return cls(
            config,
            settings,
            setup,
            SummaryRequests(own.histories, own.positions),
            loaders,
            own.history_names,
            np.asarray(own.field2id_token[own.iid_field]).astype(str),
            names,
            {stage: models[name] for stage, name in names.items()},
            device,
            dtype_of(m.dtype, device).itemsize,
            (epochs, epochs // step if step > 0 else int(not is_trained)),
            trained_parameters(recommender.body.model, settings.lora) if recommender else 0,
            limit,
        )

    def with_images(self, count: Count, items: Any) -> Count:
        """Return `count`, of questions about internal ids `items`, with the images that are really read.

        A frozen tower reads an image once a run where all features fit into the cache, else for each pass over it.
        """
        model, lora = self.models["sft"], self.settings.lora
        if model is None or not count.images or (lora.finetune != "none" and lora.lora_target == "all"):
            return count
        images = self.setup.items.images
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
        texts: Of all, written or not; `text_bytes` what one takes in UTF-8.
        rows: Of the exported file; `row_bytes` of each.
        assumed: Whether their length is only known from its limit.
        longest_chain: Summaries of one user that wait for one another.
    """

    count: Count
    texts: StandInTexts
    text_bytes: float
    rows: int
    row_bytes: float
    assumed: bool
    longest_chain: int = 1


def count_summaries(run: PlannedRun) -> tuple[CountedSummaries, CountedSummaries]:
    """Count the item summaries that some user summary reads, and the user summaries that some row reads.

    Above the run's limit a sample of items, or of users, is walked.
    """
    s, setup = run.settings.summary, run.setup
    style, items, who = setup.style, setup.items, setup.who

    def counted(
        stage: str,
        identity: str,
        most: int,
        make: Callable[[SummarySetup, Store], CachedGenerator],
        sizes: Mapping[str, int],
        write: Callable[[CachedGenerator, list[str]], Mapping[Any, str]],
    ) -> CountedSummaries:
        total, sampled, chosen = sum(sizes.values()), 0, list[str]()
        for name in sorted(sizes, key=lambda name: hash64("plan", name)) if total > run.limit else sizes:
            if sampled < run.limit or total <= run.limit:
                chosen.append(name)
                sampled += sizes[name]
        model, samples = run.models[stage], known.samples(stage.removesuffix("s"), identity)
        words = " ".join(items.titles.values()).split()[:_AT_A_TIME] or ["word"]
        each = max(1.0, tokens(model, " ".join(words)) / len(words))
        stand_ins = StandIns.like(samples) if samples else StandIns(words, max(1, (most - 1) / each), most)
        scribe = make(setup, cast(Store, known))
        writer = StandInWriter(model, stand_ins, scribe.decoding)
        scribe.write_alone(lambda: writer)
        scribe.may_write = True
        texts = write(scribe, chosen)
        if sampled < total:
            run.sampled.add(stage)
        writer.count.known = scribe.tally.known
        text_bytes = sum(len(text.encode()) for text in texts.values()) / max(1, len(texts))
        row_bytes = text_bytes + sum(len(name.encode()) for name in chosen) / max(1, len(chosen)) + 2
        row_bytes += 0 if stage == "items" else 20  # of `seen` and `history`
        count = writer.count.times(total / max(1, sampled))
        return CountedSummaries(count, StandInTexts(texts, stand_ins), text_bytes, total, row_bytes, not samples)

    with closing(ReadOnlyStore(setup.folder)) as known:
        wanted = run.requests.items(s) if s.summary_mode != "none" and s.item_summary != "none" else []
        of_items = counted(
            "items",
            who.item_identity,
            s.item_summary_tokens,
            item_generator,
            dict.fromkeys(wanted, 1),
            lambda scribe, chosen: summarize_items(scribe, style, items, chosen, s.item_summary),
        )
        summaries = of_items.texts if s.item_summary != "none" else {}
        states = run.requests.states(s) if s.summary_mode != "none" else {}
        chains = {name: steps(own, s) for name, own in states.items()}
        of_users = counted(
            "users",
            who.user_identity,
            s.user_summary_tokens,
            user_generator,
            {name: sum(map(len, levels)) for name, levels in chains.items()},
            lambda scribe, chosen: preferences(scribe, style, items, summaries, run.requests.reading(chosen), s),
        )
    longest = max(map(len, chains.values()), default=0) if s.summary_mode == "recurrent" else 1
    return of_items, replace(of_users, longest_chain=longest)


# ---- questions


def questions(run: PlannedRun, summaries: Preferences, rows: Iterable[Sequence[int]]) -> list[Prompt]:
    """Return the question of each (item, history, position), by number."""
    names, style, settings = run.histories, run.setup.style, run.settings.recommend
    return [
        question(style, settings, run.setup.items, summaries.of(names.name(history), at), str(run.items[item]))
        for item, history, at in rows
    ]


def count_training(run: PlannedRun, summaries: Preferences) -> Count:
    """Return the count of all epochs, by the batches of the first one: all of them or the first ones."""
    count, epochs, model, train = Count(), run.rounds[0], run.models["sft"], run.settings.train
    if not epochs or model is None:
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
        prompts = questions(run, summaries, zip(*columns, strict=True))
        answers = [yes_no.yes if label else yes_no.no for label in batch[run.config["LABEL_FIELD"]].tolist()]
        examples = make_examples([model.encoder(prompt) for prompt in prompts], answers)
        parts = micro_batches(model.body, examples, train.micro_batch_size, share=share)
        one = model.read(examples, [_groups(model.body, examples, part, share=share) for part in parts])
        labelled = sum(len(e.ids) - 1 if train.loss_on == "all" else e.answer for e in examples)
        one.logits = labelled * model.sizes.vocabulary
        count.add(one)
        if count.prompts >= run.limit or count.tokens >= _TOKENS:
            break
    total = int(loader.sample_size * loader.times)
    if count.prompts < total:
        run.sampled.add("sft")
    items = np.unique(getattr(own, "whole_split", own.inter_feat)[own.iid_field].numpy())
    return run.with_images(count.times(epochs * total / max(1, count.prompts)), items)


def _groups(body: Backbone, prompts: Sequence[Encoded], part: Sequence[int], *, share: bool) -> list[SharedPrefix]:
    """Return the groups among a `part` of the prompts that share a prefix."""
    found = groups(body, [prompts[i] for i in part]) if share else [SharedPrefix(tuple(range(len(part))), 0)]
    return [SharedPrefix(tuple(part[i] for i in group.rows), group.shared) for group in found]


def count_scoring(run: PlannedRun, summaries: Preferences, phase: str) -> Count:
    """Return the count of all validations (``valid``), or of the test: all pairs, or calls evenly spread over them."""
    times, count, model = run.rounds[1] if phase == "valid" else 1, Count(), run.models[phase]
    rows, total = pairs_of(run, phase)
    if not times or not total:
        return count
    starts = np.arange(0, len(rows), _CALL)
    each = written(model, questions(run, summaries, rows[:1].tolist())[0], 1).tokens
    most = max(1, int(min(run.limit, _TOKENS / max(1.0, each))) // _CALL)
    for start in starts[np.linspace(0, len(starts) - 1, min(most, len(starts))).astype(int)]:
        prompts = questions(run, summaries, rows[start : start + _CALL].tolist())
        if model is None:
            for prompt in prompts:
                count.add(written(model, prompt, 1))
            continue
        encoded = [model.encoder(prompt) for prompt in prompts]
        share = run.settings.train.share_prefix == "auto" and model.body.architecture.shares_prefix
        one = model.read(
            encoded, [[group] for group in scoring_groups(model.body, encoded, share=share)], model.body.budget.size
        )
        one.logits = 2 * len(prompts)  # of Yes and of No; the rest of the vocabulary is not computed
        count.add(one)
    if count.prompts < total:
        run.sampled.add(phase)
    return run.with_images(count.times(times * total / count.prompts), np.unique(rows[:, 0]))


def scoring_groups(body: Backbone, prompts: Sequence[Encoded], *, share: bool) -> list[SharedPrefix]:
    """Return about the groups in which `prompts` are scored: those that share much, and what is left."""
    found = _groups(body, prompts, range(len(prompts)), share=share)
    worth = [group for group in found if group.shared * (len(group.rows) - 1) >= LEAST_GAIN]
    rest = sorted({i for group in found if group not in worth for i in group.rows})
    if not rest:
        return worth
    keys = [input_key(body, prompts[i]) for i in rest] if share else []
    common = len(os.path.commonprefix([min(keys), max(keys)])) if len(keys) > 1 else 0
    return [*worth, SharedPrefix(tuple(rest), common if common * (len(rest) - 1) >= LEAST_GAIN else 0)]


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
        train = run.loaders["train"]._dataset
        counts = np.bincount(train.inter_feat[train.iid_field].numpy(), minlength=items + 1)[1:] + 0.1
        shown = 1 + np.random.default_rng(run.config["seed"]).choice(items, total, p=counts / counts.sum())
    order = np.lexsort((places[own], histories[own], shown, own // max(1, batch)))
    return np.c_[shown, histories[own], places[own]][order], total


# ---- a dry run


def dry_run(config: Any, which: str, since: str | None = None) -> list[str]:
    """Return what summarising for a run of `config` would take, of users active `since` then alone (`estimate`)."""
    _, setup, dataset, loaders = _prepared(config, config["device"])
    own = loaders["train"]._dataset
    requests = SummaryRequests(own.histories, own.positions)
    if since is not None:
        requests = requests.of(users_since(dataset, since))
    return distributed.on_main(lambda: estimate(setup, requests, which))


def estimate(setup: SummarySetup, requests: SummaryRequests, which: str) -> list[str]:
    """Return, a line a stage, how many prompts ``items``, ``users`` or ``all`` would take, and how long; write nothing.

    What a killed run of several processes has left unmerged counts as written, and stays where it is. Users' later
    prompts hold answers that are not there yet; stand-ins like the first answers are read in their place.

    Raises:
        UserError: The model is split among processes, or answers none of the first prompts.
    """
    s, lines = setup.settings, []
    with closing(ReadOnlyStore(setup.folder)) as known:
        scribe = item_generator(setup, cast(Store, known))
        writer = _trying(scribe)
        texts = summarize_items(scribe, setup.style, setup.items, requests.items(s), s.item_summary)
        lines.append(_line(scribe, writer))
        if which != "items" and s.summary_mode != "none":
            scribe = user_generator(setup, cast(Store, known))
            writer = _trying(scribe)
            preferences(scribe, setup.style, setup.items, texts, requests, s)
            lines.append(_line(scribe, writer))
    return lines


def _trying(scribe: CachedGenerator) -> StandInWriter:
    """Let a writer answer for `scribe` that tries its model on a few prompts, unless a server has it."""
    load = None if is_server(scribe.identity) else _refuse if scribe.in_step else scribe.load
    numbers = StandIns([f"{n:05}" for n in range(100_000)], 1, 1)
    writer = StandInWriter(None, numbers, scribe.decoding, load, scribe.identity)
    scribe.write_alone(lambda: writer)
    return writer


def _refuse() -> Writer:
    raise UserError(
        "--dry-run lets one process try the model, which does not work with one that is split among several; start it "
        "without FSDP, or see what `plan` counts"
    )


def _line(scribe: CachedGenerator, writer: StandInWriter) -> str:
    """Return the counts of a dry run and what they would take, for people."""
    head = f"{scribe.kind} summaries: {scribe.tally.asked:,} prompts, {scribe.tally.known:,} known"
    prompts = round(writer.count.prompts)
    if not prompts:
        return f"{head}, nothing to write"
    if writer.load is None:
        return (
            f"{head}, {prompts:,} to write, by {writer.identity}: {writer.characters:,} characters to read beside "
            "images and earlier answers; its tokens, price and time are not known, as a dry run sends nothing to a "
            "server"
        )
    # tokens grow with the prompts' characters, images included in the ratio of those tried
    read = sum(answer.prompt_tokens for answer in writer.tried) * writer.characters / writer.tried_characters
    seconds = writer.seconds * prompts / len(writer.tried)
    return (
        f"{head}, {prompts:,} to write: about {read:,.0f} tokens to read and {writer.count.new_tokens:,.0f} to write, "
        f"about {duration(seconds)} (probe: {len(writer.tried)} prompts in {writer.seconds:.1f} s)"
    )
