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
from PIL import Image, ImageOps
from recbole.utils import init_seed

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
from recbole_mllm.evaluation.full_ranking import DENSE, MOST_SCORES
from recbole_mllm.evaluation.loader import FrozenEvalDataLoader
from recbole_mllm.mllm.backbone import FEATURE_BYTES, Backbone
from recbole_mllm.mllm.encoder import Encoded, Encoder, ImageInput, answer_tokens
from recbole_mllm.mllm.hf import positions_of
from recbole_mllm.mllm.interface import Answer, Batch, Decoding, Work, Writer
from recbole_mllm.mllm.loading import dtype_of, load
from recbole_mllm.mllm.loss import example_loss, make_examples, micro_batches
from recbole_mllm.mllm.scoring import yes_logits
from recbole_mllm.model.row_scoring import deals_by_item, question, shares_in_training
from recbole_mllm.model.summarizers import make_summary_setup, summary_requests
from recbole_mllm.plan.cost import Count, ModelSizes, trained_parameters
from recbole_mllm.plan.plan_text import duration
from recbole_mllm.quick_start import read_and_split
from recbole_mllm.summaries.chains import steps
from recbole_mllm.summaries.generator import CachedGenerator, item_generator, user_generator
from recbole_mllm.summaries.item_summaries import summarize_items
from recbole_mllm.summaries.preferences import Preferences
from recbole_mllm.summaries.since import users_since
from recbole_mllm.summaries.store import ReadOnlyStore
from recbole_mllm.summaries.user_summaries import preferences

FULL_RANKING = "full_ranking"  # of all items, which a benchmark does beside drawn candidates
STAGES = ("items", "users", "sft", "valid", "test", FULL_RANKING)
LIMIT = 20_000  # prompts of a stage that are all counted; beyond, a sample stands for them
CHARACTERS = 4  # of a token, where only a server has the tokenizer
_TRIED = 16  # prompts that a dry run has answered
_AT_A_TIME = 4096
_TOKENS = 4e6  # of a stage's prompts that are looked at one by one: prompts with images are long
_CALL = 1024  # pairs that are scored together
_PAIRS = 2**20  # pairs of a ranking of all items that are listed; those of the other rows are like them


# ---- prompts become tokens


@dataclass(slots=True)
class SizedEncoder(Encoder):
    """Preprocesses one image of each size: what an image becomes in tokens and patches follows from its size."""

    _known: dict[Any, ImageInput] = field(default_factory=dict)  # by size, and by path

    def image(self, path: Path) -> ImageInput:
        """Return what an image of this size becomes, under the key of this one."""
        if path not in self._known:
            with Image.open(path) as image:
                ImageOps.exif_transpose(image, in_place=True)  # decodes turned ones alone
                size = image.size
            if size not in self._known:
                self._known[size] = Encoder.image(self, path)
            self._known[path] = replace(self._known[size], key=image_digest(path))
        return self._known[path]


class PlannedModel(Backbone):
    """A model without its weights: counts the passes that scoring and the loss make through it, and computes none.

    Raises:
        UserError: Its config, tokenizer or processor is neither on this disk nor to be had.
    """

    def __init__(self, name: str, settings: MLLMSettings) -> None:
        try:
            trusted = settings.trust_remote_code
            loaded = load(name, torch.float32, torch.device("meta"), trust_remote_code=trusted, weights=False)
        except UserError as error:
            at = f" --revision {revision}" if (revision := revision_of(name)) else ""
            raise UserError(
                f"{error}; a plan reads its config, tokenizer and processor files and no weights: "
                f"`hf download {source_of(name)}{at} --include '*.json' '*.jinja' '*.model' '*.txt'` fetches them"
            ) from error
        super().__init__(loaded.model)
        limits = settings.max_text_tokens, self.architecture, positions_of(loaded.model.config)
        self.encoder = SizedEncoder(loaded.tokenizer, loaded.processor, *limits)
        self.sizes, self.count = ModelSizes.of(loaded.model), Count()
        self.held = 0  # tokens of all passes, padding included
        own = self.architecture  # a family without a row is not tried: it is counted without shared prefixes
        self.scoring_mode, self.mode_sees = "shared" if own.known and own.shares_prefix else "flat", True

    def hidden(self, rows: Sequence[Encoded], start: int, stops: Sequence[int], cache: Any) -> torch.Tensor:
        """Count the pass; return states without numbers."""
        ends, width = list(zip(rows, stops, strict=True)), max(stops) - start
        images = [i for row, stop in ends if self.image_token_id in row.ids[start:stop] for i in row.images]
        self.held += len(rows) * width
        self.count.add(
            Count(
                computed=sum(stop - start for stop in stops),
                attended=sum((stop - start) * stop for stop in stops),
                images=len(images),
                vision_flops=sum(self.sizes.image_flops(image.tensors, len(image.ids)) for image in images),
                at_once=len(rows) * width,
                widest=len(rows) * max(stops),
                prefix=max(stop if stop < len(row.ids) else 0 for row, stop in ends),
            )
        )
        return torch.empty(len(rows), width, self.sizes.width, device="meta")

    def logits(self, states: torch.Tensor, tokens: Sequence[int] | None = None) -> torch.Tensor:
        """Count the logits; return zeros for single `tokens`, for the vocabulary logits without numbers."""
        every = self.sizes.vocabulary
        if tokens is None:
            self.count.predicted += len(states)
            return torch.empty(len(states), every, device="meta")
        self.count.predicted += len(states) * len(tokens) / every
        return torch.zeros(len(states), len(tokens))

    def count_written(self, prompt: Prompt, new: float, room: int = 0) -> Count:
        """Return the count of answering `prompt` with `new` tokens, of up to `room` that the answer may have."""
        encoded = self.encoder(prompt, room=room)
        self._begin([encoded])
        self.hidden([encoded], 0, [len(encoded.ids)], None)
        return replace(self.count, new_tokens=new, predicted=new)

    def count_scored(self, prompts: Sequence[Encoded], *, share: bool) -> Count:
        """Return the count of scoring `prompts` in one call."""
        self._begin(prompts)
        yes_logits(self, prompts, (0, 1), share_prefix=share)
        return self.count

    def count_trained(self, examples: Sequence[Encoded], micro: int | None, *, whole: bool, share: bool) -> Count:
        """Return the count of one batch of training, there; `cost.flops` adds the way back."""
        self._begin(examples)
        widest = 0
        for part in micro_batches(self, examples, micro, share=share):
            self.held = 0
            example_loss(self, [examples[i] for i in part], whole=whole, share=share)
            widest = max(widest, self.held)
        return replace(self.count, widest=widest)

    def _begin(self, prompts: Sequence[Encoded]) -> None:
        lengths = [len(prompt.ids) for prompt in prompts]
        shown = sum(len(image.ids) for prompt in prompts for image in prompt.images)
        text = sum(lengths) - shown
        self.count = Count(len(prompts), text_tokens=text, image_tokens=shown, longest=max(lengths))


def count_served(prompt: Prompt, new: float) -> Count:
    """Return the count of a prompt for a server: text tokens are guessed, and those of images are not known."""
    text = -(-len(prompt.text) // CHARACTERS)
    return Count(1, text_tokens=text, new_tokens=new, computed=text, images=len(prompt.images), longest=text)


# ---- texts nobody has written yet


class StandIns(dict[Any, str]):
    """Texts by name: `length` of `words`, taken to have `tokens` tokens, stand for each that is not known.

    They differ from each other as answers do: equal texts would make prompts share more than they will.
    """

    def __init__(self, words: Sequence[str], length: float, tokens: float) -> None:
        self.words, self.length, self.tokens = words, length, tokens

    @classmethod
    def like(cls, samples: Sequence[tuple[str, int]]) -> Self:
        """Return stand-ins as long as the `samples`, texts with their tokens, and of their words."""
        words = [word for text, _ in samples for word in text.split()]
        return cls(words, len(words) / len(samples), sum(new for _, new in samples) / len(samples))

    @classmethod
    def longest(cls, titles: Iterable[str], model: PlannedModel | None, most: int) -> Self:
        """Return stand-ins of `most` tokens of `model`, of the words of `titles`."""
        words = " ".join(titles).split()[:_AT_A_TIME] or ["word"]
        text = " ".join(words)
        if model is None:
            size = len(text) / CHARACTERS
        else:
            size = len(model.encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
        return cls(words, max(1, (most - 1) / max(1.0, size / len(words))), most)

    def __missing__(self, name: Any) -> str:
        return " ".join(random.Random(hash64("stand-in", name)).choices(self.words, k=round(self.length)))

    def get(self, name: Any, default: Any = None) -> Any:
        """Return the text of `name`, or its stand-in; `default` is not needed."""
        return self[name]


@dataclass(slots=True)
class StandInWriter:
    """A `Writer` that counts its prompts: a model answers the first few, if there is one to `load`, stand-ins the rest.

    Prompts with another `decoding` are not counted: they are a second try at one that its stand-in repeats. `tried` are
    the model's answers, which took `seconds`. `texts` stand for all it has not been asked for as well.
    """

    model: PlannedModel | None
    texts: StandIns
    decoding: Decoding
    load: Callable[[], Writer] | None = None
    identity: str = "plan"
    count: Count = field(default_factory=Count)
    tried: dict[int, Answer] = field(default_factory=dict)
    seconds: float = 0.0
    asked: int = 0  # how many texts there are, those in the store included
    assumed: bool = True  # that they are as long as they may be

    def write(self, work: Work) -> None:
        """Answer every prompt.

        Raises:
            UserError: The model answers none of the first prompts.
        """
        while asks := work.take(_AT_A_TIME if self.tried or self.load is None else _TRIED):
            answers: Mapping[int, Answer] = {}
            if not self.tried and self.load is not None:
                answers = self.tried = self._try(self.load(), [ask.prompt for ask in asks], asks[0].decoding)
                self.texts = StandIns.like([(answer.text, answer.new_tokens) for answer in answers.values()])
            for place, ask in enumerate(asks):
                new, prompt, room = self.texts.tokens, ask.prompt, ask.decoding.max_new_tokens
                if ask.decoding == self.decoding:
                    model = self.model
                    self.count.add(model.count_written(prompt, new, room) if model else count_served(prompt, new))
                text = self.texts[prompt.marked, *(path.name for path in prompt.images)]
                work.give([(ask.place, answers.get(place, Answer(text, 0, round(new))))])

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
        self.loaders = {"train": loaders.train, "valid": loaders.valid, "test": loaders.test}
        self.train = own = loaders.train._dataset
        self.requests = summary_requests(own, self.settings, config["finetune"])
        if since is not None:
            self.requests = self.requests.of(users_since(dataset, since))
        self.items = np.asarray(own.field2id_token[own.iid_field]).astype(str)  # raw ids by internal ones
        m, is_trained = self.settings.mllm, self.settings.lora.finetune != "none"
        self.item_bytes = dtype_of(m.dtype, device).itemsize
        self.names = dict.fromkeys(STAGES, m.source("mllm"))
        self.names |= {"items": m.source("item_summarizer"), "users": m.source("user_summarizer")}
        self.epochs = int(config["epochs"]) if is_trained else 0
        step = min(int(config["eval_step"]), self.epochs)
        self.validations = self.epochs // step if step > 0 else int(not self.epochs)  # early stopping aside
        self._models: dict[str, PlannedModel] = {}
        self._images_read: set[int] = set()

    def model(self, stage: str) -> PlannedModel | None:
        """Return the model of a `stage`, None of a server's.

        Raises:
            UserError: It cannot be read (`PlannedModel`).
        """
        name = self.names[stage]
        if name not in self._models and not is_server(name):
            self._models[name] = PlannedModel(name, self.settings.mllm)
        return self._models.get(name)

    @property
    def ranks_all(self) -> bool:
        """Whether a benchmark would re-rank a retriever's best of all items too (`quick_start.run`)."""
        return isinstance(self.loaders["test"], FrozenEvalDataLoader) and self.settings.ranking.retrieves

    @cached_property
    def trained(self) -> int:
        """How many parameters are trained."""
        model = self.model("sft")
        return trained_parameters(model.model, self.settings.lora) if model is not None else 0

    def questions(self, summaries: Preferences, rows: Iterable[Sequence[int]]) -> list[Prompt]:
        """Return the question of each (item, history, position), by number."""
        name, style, settings = self.train.history_names.name, self.setup.style, self.settings.recommend
        return [
            question(style, settings, self.setup.items, summaries.of(name(history), at), str(self.items[item]))
            for item, history, at in rows
        ]

    def scaled(self, count: Count, total: float, items: Any) -> Count:
        """Return the count of `total` questions about all internal ids `items`, of which `count` are some.

        A frozen tower reads an image once a run where all features fit into the cache, else for each pass over it.
        """
        count = count.times(total / max(1, count.prompts))
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


def count_summaries(run: PlannedRun, which: str = "all", *, tried: bool = False) -> dict[str, StandInWriter]:
    """Count the item summaries that some user summary reads, and (unless `which` is ``items``) the user summaries.

    Above the run's limit a sample of items, or of users, is walked. With `tried` the models of this machine are loaded
    and answer the first prompts; what a killed run of several processes has left unmerged is known as well.
    """
    s, setup, requests = run.settings.summary, run.setup, run.requests
    style, items = setup.style, setup.items
    with closing(ReadOnlyStore(setup.folder)) as store:

        def counted(
            stage: str, generator: CachedGenerator, sizes: Mapping[str, int], write: Callable[..., Mapping[Any, str]]
        ) -> StandInWriter:
            model, most = run.model(stage) if sizes else None, generator.decoding.max_new_tokens
            samples = store.samples(generator.kind, generator.identity)
            texts = StandIns.like(samples) if samples else StandIns.longest(items.titles.values(), model, most)
            load = generator.load if tried and not is_server(run.names[stage]) else None
            writer = StandInWriter(model, texts, generator.decoding, load, generator.identity)
            generator.write_alone(lambda: writer)
            generator.may_write = True
            chosen = _sampled(sizes, run.limit)
            found = write(chosen)
            writer.texts.update(found)
            writer.asked, writer.assumed = sum(sizes.values()), not samples
            writer.count.known, writer.count.sampled = generator.tally.known, len(chosen) < len(sizes)
            writer.count = writer.count.times(writer.asked / max(1, sum(sizes[name] for name in chosen)))
            return writer

        wanted = requests.items(s) if s.summary_mode != "none" and s.item_summary != "none" else []
        of_items = item_generator(setup, store)
        out = {
            "items": counted(
                "items",
                of_items,
                dict.fromkeys(wanted, 1),
                lambda chosen: summarize_items(of_items.answer_all, style, items, chosen, s.item_summary),
            )
        }
        if which != "items":
            read = out["items"].texts if s.item_summary != "none" else {}
            states = requests.states(s) if s.summary_mode != "none" else {}
            of_users = user_generator(setup, store)
            out["users"] = counted(
                "users",
                of_users,
                {name: sum(map(len, steps(own, s))) for name, own in states.items()},
                lambda chosen: preferences(of_users, style, items, read, requests.reading(chosen), s),
            )
        return out


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
    share = may_share and shares_in_training(run.settings, model)
    loader = SeededTrainDataLoader.of(run.loaders["train"], may_share and deals_by_item(run.settings, model))
    loader.set_epoch(0)
    own, style = loader._dataset, run.setup.style
    yes_no = answer_tokens(model.encoder, style.answer_yes, style.answer_no)
    for batch in loader:
        columns = (batch[name].tolist() for name in (own.iid_field, HISTORY_NUMBER, POSITION))
        prompts = run.questions(summaries, zip(*columns, strict=True))
        answers = [yes_no.yes if label else yes_no.no for label in batch[run.config["LABEL_FIELD"]].tolist()]
        examples = make_examples([model.encoder(prompt) for prompt in prompts], answers)
        whole = train.loss_on == "all"
        count.add(model.count_trained(examples, train.micro_batch_size, whole=whole, share=share))
        if count.prompts >= run.limit or count.tokens >= _TOKENS:
            break
    total = int(loader.sample_size * loader.times)
    count.sampled = count.prompts < total
    items = np.unique(own.whole_split[own.iid_field].numpy())
    return run.scaled(count, run.epochs * total, items)


def count_scoring(run: PlannedRun, summaries: Preferences, phase: str) -> Count:
    """Return the count of all validations (``valid``), or of a test: all pairs, or calls evenly spread over them."""
    times, count, model = run.validations if phase == "valid" else 1, Count(), run.model(phase)
    rows, total = pairs_of(run, phase)
    if not times or not total:
        return count
    share = run.settings.train.share_prefix == "auto"
    calls = [rows[start : start + _CALL].tolist() for start in range(0, len(rows), _CALL)]
    (first,) = run.questions(summaries, calls[0][:1])
    each = (model.count_written(first, 1) if model else count_served(first, 1)).tokens
    most = max(1, int(min(run.limit, _TOKENS / max(1.0, each))) // _CALL)
    for call in np.linspace(0, len(calls) - 1, min(most, len(calls))).astype(int):
        prompts = run.questions(summaries, calls[call])
        if model is None:
            for prompt in prompts:
                count.add(count_served(prompt, 1))
        else:
            count.add(model.count_scored([model.encoder(prompt) for prompt in prompts], share=share))
    count.sampled = count.prompts < total
    return run.scaled(count, times * total, np.unique(rows[:, 0]))


def pairs_of(run: PlannedRun, phase: str) -> tuple[Any, int]:
    """Return the pairs an evaluation scores, ``[N, 3]`` of item, history and position, item by item; and their number.

    Of a ranking of all items the first rows' pairs are returned. What a retriever that is not trained yet would put
    first is not known: items drawn by popularity stand for it.
    """
    beside, ranking = phase == FULL_RANKING, run.settings.ranking
    loader = run.loaders["test" if beside else phase]
    part = loader._dataset
    histories, places, targets = (part.inter_feat[f].numpy() for f in (HISTORY_NUMBER, POSITION, part.iid_field))
    rows, items, batch = len(targets), int(part.item_num) - 1, len(targets)
    if isinstance(loader, FrozenEvalDataLoader) and not beside:
        own = np.r_[np.arange(rows), np.repeat(np.arange(rows), loader.count)]
        shown, total = np.r_[targets, loader.negatives], len(own)
    else:
        brute = ranking.full_sort == "brute"
        each = items if brute else min(ranking.top_k, items)
        rows = min(rows, max(1, MOST_SCORES // (items + 1))) if beside else rows
        own, total = np.repeat(np.arange(min(rows, max(1, _PAIRS // each))), each), rows * each
        if brute:
            shown = np.tile(np.arange(1, items + 1), len(own) // each)
            batch = max(1, min(int(run.config["eval_batch_size"]), DENSE // (items + 1)))
        else:
            met = run.train.inter_feat[run.train.iid_field].numpy()
            shown = np.random.default_rng(run.config["seed"]).choice(met, len(own))
    # a batch's rows are scored item by item; with candidates of their own, all rows
    order = np.lexsort((places[own], histories[own], shown, own // max(1, batch)))
    return np.c_[shown, histories[own], places[own]][order], total


# ---- a dry run


def dry_run(config: Any, which: str, since: str | None = None) -> list[str]:
    """Return, a line a stage, what summarising ``items``, ``users`` or ``all`` for a run of `config` would take.

    Then the tag that the files will bear. Of users active `since` alone, if given. The model answers a few prompts;
    nothing is written.

    Raises:
        UserError: The model is split among processes, or answers none of the first prompts.
    """
    run = PlannedRun(config, config["device"], since=since)
    if any(one.is_split for one in run.setup.summarizers.values()):
        raise UserError(
            "--dry-run lets one process try the model, which does not work with one that is split among several; "
            "start it without FSDP, or see what `plan` counts"
        )

    def lines() -> list[str]:
        found = count_summaries(run, which, tried=True)
        counted = [_line(stage, one) for stage, one in found.items() if one.asked or stage == "items"]
        return [*counted, f"tag: {run.setup.tag}"]

    return distributed.on_main(lines)


def _line(stage: str, writer: StandInWriter) -> str:
    """Return the counts of a dry run and what they would take, for people."""
    count = writer.count
    about = "about " if count.sampled else ""
    head = f"{stage.removesuffix('s')} summaries: {writer.asked:,} prompts, {about}{round(count.known):,} known"
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
