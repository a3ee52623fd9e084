"""MLLM-MSR as a RecBole model: glue between rows, prompts and the multimodal LLM."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor

from recbole_mllm.common import distributed
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.model_names import is_same, is_server, revision_of
from recbole_mllm.common.progress import Progress
from recbole_mllm.common.prompts import Prompt
from recbole_mllm.common.settings import Settings
from recbole_mllm.data.histories import user_of
from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION
from recbole_mllm.mllm import placement, sharding
from recbole_mllm.mllm.encoder import Encoded
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.lora import load_trained_state, save_trained, trained_state, tune
from recbole_mllm.mllm.loss import example_loss, micro_batches
from recbole_mllm.mllm.server_scoring import ServedScorer
from recbole_mllm.model.row_scoring import (
    AHEAD,
    IMAGE_TOKENS,
    Costs,
    Row,
    Scores,
    deals_by_item,
    item_major,
    question,
    row_costs,
    score_in_chunks,
    score_in_shares,
    shares_in_training,
    training_share,
)
from recbole_mllm.model.score_cache import ScoreCache, state_digest
from recbole_mllm.model.summarizers import check_recommender, prepare_summaries
from recbole_mllm.retrieval.reranker import Reranker, Shortlist, obtain_reranker
from recbole_mllm.summaries.preferences import Preferences


class MLLMMSR(SequentialRecommender):  # type: ignore[misc]
    """MLLM-MSR: ask a fine-tuned multimodal LLM whether the user would take the item (Ye et al., AAAI 2025).

    Args:
        config: RecBole's.
        dataset: The training part.
        preferences: What `prepare_summaries` has returned.
        reranker: What `obtain_reranker` has returned.

    Both are steps of `quick_start.run`. Stock RecBole knows of neither: then they are taken here.
    """

    input_type = InputType.POINTWISE

    def __init__(
        self, config: Any, dataset: Any, preferences: Preferences | None = None, reranker: Reranker | None = None
    ) -> None:
        super().__init__(config, dataset)
        self.settings = Settings.from_config(config)
        for key, revision in self.settings.mllm.revisions().items():
            config[key] = revision  # as checkpoints and records keep the configuration
        check_recommender(config, self.settings, dataset)
        self.reranker = reranker or obtain_reranker(config, dataset)
        self.preferences = preferences or prepare_summaries(config, dataset)
        self.items, self.style = self.preferences.items, self.preferences.style
        self.history_names = dataset.history_names
        self.tokens = np.asarray(dataset.field2id_token[self.ITEM_ID]).astype(str)
        self.label_field = config["LABEL_FIELD"]
        started = time.perf_counter()
        self.mllm: Any = self._load_mllm(config["seed"])
        self.load_s = time.perf_counter() - started
        self.answers = self.mllm.answers(self.style)
        self.backbone = self.mllm.model
        self._ahead: Scores = {}
        self._cache = ScoreCache(Path(config["checkpoint_dir"]))
        self._tells_shortened = False
        self._in_shares = False  # whether all processes now ask for the same scores at the same time
        self._elsewhere = [0, 0]  # tokens read and cached scores found by other processes

    def _load_mllm(self, seed: int) -> HFModel | ServedScorer:
        """Return what scores: a model in this process, ready to be trained, or one behind servers."""
        settings, lora = self.settings, self.settings.lora
        if is_server(settings.mllm.mllm):
            return ServedScorer(settings.mllm.endpoint("mllm"), settings.server, settings.mllm)
        split, four_bit = sharding.wanted() is not None, lora.finetune == "qlora"
        name = settings.mllm.source("mllm")
        mllm = HFModel(name, settings.mllm, self.device, four_bit=four_bit, to_split=split)
        mllm.replace_model(tune(mllm.model, lora, seed, revision_of(name)))
        if split:
            mllm.split()
        if self.is_trained and settings.train.gradient_checkpointing:
            mllm.checkpoint_gradients()
        return mllm

    # --- rows and their questions ---

    def rows_of(self, interaction: Interaction) -> list[Row]:
        """Return (history, position, item) of each row, by number."""
        columns = (interaction[HISTORY_NUMBER], interaction[POSITION], interaction[self.ITEM_ID])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def prompts_of(self, rows: Iterable[Row]) -> list[Prompt]:
        """Return the question of each (history, position, item), by number; training and scoring both ask it."""
        return [self._prompt_of(row) for row in rows]

    def _prompt_of(self, row: Row) -> Prompt:
        history, position, item = row
        preference = self.preferences.of(self.history_names.name(history), position)
        return question(self.style, self.settings.recommend, self.items, preference, str(self.tokens[item]))

    def raw_rows(self, interaction: Interaction) -> list[tuple[str, str, int, int]]:
        """Return the raw user, raw item, position and label of each row, for people to read."""
        rows, labels, name = self.rows_of(interaction), interaction[self.label_field].tolist(), self.history_names.name
        named = zip(rows, labels, strict=True)
        return [(user_of(name(h)), str(self.tokens[i]), p, int(label)) for (h, p, i), label in named]

    # --- training ---

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Return the mean next-token loss of the right answers (paper, eq. 2, or over the answer alone)."""
        whole = self.settings.train.loss_on == "all"
        return example_loss(self.mllm.backbone, self._examples(interaction), whole=whole, share=self.shares_prefix)

    def micro_batches(self, interaction: Interaction) -> list[list[int]]:
        """Return which rows of a batch one backward pass holds together: `calculate_loss` then takes each part."""
        size = self.settings.train.micro_batch_size
        return micro_batches(self.mllm.backbone, self._examples(interaction), size, share=self.shares_prefix)

    def _examples(self, interaction: Interaction) -> list[Encoded]:
        prompts = self.prompts_of(self.rows_of(interaction))
        examples: list[Encoded] = self.mllm.examples(prompts, interaction[self.label_field], self.answers)
        return examples

    def training_share(self, interaction: Interaction) -> list[int]:
        """Return the places of a batch's rows that this process trains on."""
        return training_share(self.rows_of(interaction), self._costs)

    @property
    def shares_prefix(self) -> bool:
        """Whether rows of a micro-batch share the computation of a common prefix.

        Not where layers are split: each pass forward of the processes that hold them has one back.
        """
        return shares_in_training(self.settings, self.mllm.backbone) and not self.mllm.backbone.split

    @property
    def groups_by_item(self) -> bool:
        """Whether rows of one item should meet in a batch: they share a prefix, and a pass may hold several rows."""
        return self.is_trained and deals_by_item(self.settings, self.mllm.backbone)  # a server's model has none

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to fine-tune (not so for ``finetune: none``)."""
        return self.settings.lora.finetune != "none"

    def release_memory(self) -> bool:
        """Free what can be computed again (image features); return whether there was any."""
        return bool(self.mllm.backbone.forget_features())

    # --- scoring ---

    def predict(self, interaction: Interaction) -> Tensor:
        """Return ``[B]`` float32 log-odds of Yes: monotone in P(Yes) (paper, eq. 1), without its ties near 0 and 1."""
        return torch.tensor(self._log_odds(self.rows_of(interaction)), device=self.device)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Return ``[B * items]`` float32: the retriever's best items as the MLLM orders them, then its other items.

        Without a retriever every item is asked about, as RecBole's ``full_sort_topk`` wants it for a few users.
        """
        return self.ranking(interaction)[0].view(-1)

    def ranking(self, interaction: Interaction) -> tuple[Tensor, Any]:
        """Return ``[B, items]`` scores as `full_sort_predict` does, and the MLLM's log-odds, NaN where not asked."""
        if self.reranker is None:
            moments = list(zip(interaction[HISTORY_NUMBER].tolist(), interaction[POSITION].tolist(), strict=True))
            every = self._log_odds([(*moment, item) for moment in moments for item in range(1, self.n_items)])
            answers = np.full((len(moments), self.n_items), np.nan, np.float32)
            answers[:, 1:] = np.reshape(every, (len(moments), -1))
            scores = torch.from_numpy(answers.copy())
            scores[:, 0] = -torch.inf
            return scores.to(self.device), answers
        short = self.reranker.shortlist(interaction)
        asked, rows = short.asked > 0, np.arange(len(interaction))[:, None]
        log_odds = np.zeros(asked.shape)
        log_odds[asked] = self._log_odds(self.rows_asked(interaction, short))
        answers = np.full(short.scores.shape, np.nan, np.float32)
        answers[rows, short.asked] = np.where(asked, log_odds, np.nan)
        return short.ranked(log_odds, self.reranker.share).to(self.device), answers

    def rows_asked(self, interaction: Interaction, short: Shortlist) -> list[Row]:
        """Return (history, position, item) of each pair that `short`, of `interaction`, asks about, row by row."""
        histories, places = interaction[HISTORY_NUMBER].tolist(), interaction[POSITION].tolist()
        rows, columns = np.nonzero(short.asked)
        items = short.asked[rows, columns].tolist()
        return [(histories[row], places[row], item) for row, item in zip(rows.tolist(), items, strict=True)]

    def score_ahead(self, rows: Iterable[Row]) -> None:
        """Score distinct `rows` item by item, so that users of one item share its computation."""
        ordered = sorted(set(rows), key=item_major)
        with Progress(len(ordered), "scoring", "pair") as progress:
            self._ahead |= self._scores(ordered, progress)

    def ask(self, rows: Sequence[Row]) -> list[float]:
        """Return the log-odds of `rows` from the MLLM itself."""
        return self._ask_prompts(self.prompts_of(rows))

    def score_items(self, preference: str, items: Sequence[str]) -> list[float]:
        """Return the log-odds of Yes of `items`, given by raw id, for a user of whom `preference` is known."""
        ask = self.settings.recommend
        prompts = [question(self.style, ask, self.items, preference, item) for item in items]
        found: list[float] = []
        with Progress(len(prompts), "scoring", "pair") as progress:
            for start in range(0, len(prompts), AHEAD):
                part = prompts[start : start + AHEAD]
                found += self._ask_prompts(part)
                progress.update(len(part))
        return found

    def _log_odds(self, rows: Sequence[Row]) -> list[float]:
        """Return the log-odds of `rows`; what has not been scored ahead is scored item by item, and forgotten."""
        missing = sorted(set(rows) - self._ahead.keys(), key=item_major)
        new = self._scores(missing) if missing else {}
        return [new[row] if row in new else self._ahead[row] for row in rows]

    def _scores(self, ordered: Sequence[Row], progress: Progress | None = None) -> Scores:
        """Return the log-odds of rows in item-major order, shared out among the processes within `evaluating`."""
        if not self._in_shares or not distributed.is_launched():
            return score_in_chunks(ordered, self._scores_here, progress, len(ordered))
        scores, elsewhere = score_in_shares(
            ordered, self._costs, self._scores_here, lambda: (self.mllm.tokens_read, self._cache.reused), progress
        )
        self._elsewhere = [a + b for a, b in zip(self._elsewhere, elsewhere, strict=True)]
        return scores

    def _costs(self, rows: Sequence[Row]) -> Costs:
        item_first = self.settings.recommend.prompt_order == "item-first"
        return row_costs(rows, map(self._prompt_of, rows), self._image_tokens, item_first=item_first)

    @cached_property
    def _image_tokens(self) -> int:
        """The tokens of the first item's image, which stands for all, so that every process finds the same number."""
        encoder, first = self.mllm.encoder, next(iter(self.items.images.values()), None)
        if encoder is None or first is None or not self.settings.recommend.use_image:
            return IMAGE_TOKENS
        return len(encoder.image(first).ids)

    def _scores_here(self, rows: Sequence[Row]) -> Scores:
        """Return the log-odds of `rows`, those cached by earlier evaluations where that is allowed."""
        return dict(zip(rows, self._cache.scores(self.prompts_of(rows), self._ask_prompts, self._state), strict=True))

    def _ask_prompts(self, prompts: Sequence[Prompt]) -> list[float]:
        share = self.settings.train.share_prefix == "auto"
        return self.mllm.yes_scores(prompts, self.answers, share_prefix=share).tolist() if prompts else []

    @contextmanager
    def evaluating(self, *, cached: bool) -> Iterator[None]:
        """Let the processes share what is scored within; scores made ahead are forgotten before and behind it.

        Those of a final state, not of a passing one, are `cached`.
        """
        self.forget()
        self._in_shares = True
        self._cache.use(cached and self.backbone is not None)  # a server's weights may change behind its model's name
        before = getattr(self.mllm.encoder, "truncated", 0)
        try:
            yield
        finally:
            if (shortened := getattr(self.mllm.encoder, "truncated", 0) - before) and not self._tells_shortened:
                self._tells_shortened = True
                limit = self.settings.mllm.max_text_tokens
                logging.getLogger().warning(
                    f"{shortened} questions were over max_text_tokens = {limit}, or the model's positions: their "
                    "longest texts were shortened, in training as in scoring"
                )
            self._in_shares = False
            self._cache.use(False)
            self.forget()

    def forget(self) -> None:
        """Drop the scores made ahead; they hold for one state of the adapter."""
        self._ahead = {}
        self._cache.forget_state()

    def _state(self) -> str:
        lora = self.settings.lora
        parts = self.mllm.identity, self.answers, self.settings.mllm.max_text_tokens
        how = lora.finetune, lora.lora_r, lora.lora_alpha, lora.lora_target
        return state_digest((*parts, *how), self.state_dict())

    def remove_cached_scores(self) -> None:
        """Remove the cached scores of an evaluation that is done."""
        self._cache.remove()

    @property
    def tokens_read(self) -> int:
        """How many tokens of prompts have been scored, shared prefixes counted each time."""
        return int(self.mllm.tokens_read) + self._elsewhere[0]

    @property
    def scores_reused(self) -> int:
        """How many scores came from earlier evaluations."""
        return self._cache.reused + self._elsewhere[1]

    # --- checkpoints ---

    def __str__(self) -> str:
        """Name the model and what is trained, not every layer of an LLM."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        every = sum(p.numel() for p in self.parameters())
        return f"MLLMMSR({self.mllm.identity})\nTrainable parameters: {trained} of {every}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Leave a model that lies in several places where it is, whatever RecBole's ``.to(device)`` wants."""
        return self if placement.is_dispatched(self.backbone) else super()._apply(fn, recurse)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return what is trained alone: checkpoints do not carry the base model."""
        return trained_state(self.backbone) if self.is_trained else {}

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Load what `state_dict` returned; an adapter of another model is refused."""
        if self.is_trained:
            load_trained_state(self.backbone, dict(state_dict))
        elif state_dict:
            raise UserError("the checkpoint holds an adapter, but finetune is none; set finetune: lora")
        self.forget()

    def other_parameter(self) -> dict[str, Any]:
        """Return what a checkpoint says of its base model and of how items are ranked."""
        return {"base": self.mllm.identity} | (self.reranker.state() if self.reranker else {})

    def load_other_parameter(self, para: dict[str, Any] | None) -> None:
        """Refuse a checkpoint of another base model."""
        if para and not is_same(para["base"], self.mllm.identity):
            raise UserError(
                f"the checkpoint belongs to {para['base']}, not to {self.mllm.identity}; set mllm accordingly"
            )
        if para and self.reranker:
            self.reranker.restore(para)

    def save_adapter(self, folder: Path) -> None:
        """Write what is trained into `folder`: PEFT's files, or a fully tuned model's parameters."""
        if self.is_trained:
            save_trained(self.backbone, folder, self.mllm.identity)
