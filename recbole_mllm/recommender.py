"""Recommendations from a checkpoint: the best items for a user of the dataset, or for a history that it never saw."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType, get_model

from recbole_mllm.common.checkpoint import find_checkpoint, read_checkpoint
from recbole_mllm.common.errors import UserError, as_user_error, did_you_mean
from recbole_mllm.common.resources import MLLM
from recbole_mllm.common.settings import Count, Settings, checked
from recbole_mllm.data.item_table import Items, read_items
from recbole_mllm.retrieval.baseline import Baseline, fill, load_baseline, training_part

TOP_K = 100
"""How many of a retriever's best items the MLLM is asked about."""


class Recommender:
    """Ranks items with the trained model of a checkpoint, MLLMMSR's or any of RecBole's that ranks all items.

    Args:
        checkpoint: A file ``.pth``, the folder of a benchmark's run, or the run's id below ``results/``. It is
            unpickled, as it holds RecBole's Config: open none that you do not trust.
        retriever_checkpoint: Of a baseline whose best `top_k` items MLLMMSR then ranks; without it MLLMMSR is asked
            about every item that is no part of the history.
        top_k: How many of the retriever's items are asked about.
        data_path: Where the dataset's folder lies now, if not where it lay at training.

    Raises:
        UserError: There is no such checkpoint or dataset, or its model cannot rank.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        retriever_checkpoint: str | Path | None = None,
        top_k: int = TOP_K,
        data_path: str | Path | None = None,
    ) -> None:
        self.top_k = checked("top_k", top_k, Count)
        path = find_checkpoint(str(checkpoint), model=None)
        state = read_checkpoint(path, device := torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        config = state["config"]
        self.name, self.checkpoint, self.dataset_name = str(config["model"]), path, str(config["dataset"])
        folder = str(Path(data_path) / self.dataset_name) if data_path is not None else config["data_path"]
        if not Path(folder).is_dir():
            raise UserError(
                f"the checkpoint's dataset is not in {folder}; give the folder that holds {self.dataset_name} as "
                "data_path"
            )
        self._ranker: _MLLMRanker | _BaselineRanker
        if self.name == MLLM:
            self._ranker = _MLLMRanker(state, folder, device)
        else:
            self._ranker = _BaselineRanker(load_baseline(path, state, folder, device))
        self._histories, self.items = _whole_histories(self._ranker.dataset), self._ranker.items
        self.retriever: Recommender | None = None
        if retriever_checkpoint is not None:
            if self.name != MLLM:
                raise UserError(f"{path} is a checkpoint of {self.name}, which ranks all items itself; a retriever is "
                                "for MLLMMSR")  # fmt: skip
            self.retriever = Recommender(retriever_checkpoint, data_path=data_path)
            if self.retriever.name == MLLM:
                raise UserError(f"retriever_checkpoint {retriever_checkpoint} is one of MLLMMSR; give a baseline's")

    @property
    def users(self) -> list[str]:
        """The raw ids of the dataset's users."""
        return list(self._histories)

    def history(self, user: str | int) -> list[str]:
        """Return the raw ids of all items of a user of the dataset, oldest first.

        Raises:
            UserError: The dataset has no such user.
        """
        try:
            return list(self._histories[str(user)])
        except KeyError:
            hint = did_you_mean(str(user), self._histories, "for a user it has not seen give a history of item ids")
            raise UserError(f"dataset {self.dataset_name} has no user {user!r}; {hint}") from None

    def recommend(
        self,
        user: str | int | Iterable[str | int] | None = None,
        *,
        history: Sequence[str] | None = None,
        top: int = 10,
        candidates: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Return the `top` best items for one user, best first, or for each of several.

        Args:
            user: A raw id of the dataset; all its interactions are read, those of the test split too. Of several, all
                are looked up before any is ranked.
            history: Instead of `user`: raw ids of items, oldest first.
            top: How many rows come back, at most.
            candidates: Raw ids of the items to rank; by default all that are no part of the history.

        Returns:
            Columns ``rank`` (from 1), ``item_id``, ``title``, ``score`` (MLLMMSR: log-odds of Yes; higher is better)
            and, for MLLMMSR alone, ``p_yes``. Of several users, before them ``user_id``, in the order given.

        Raises:
            UserError: A user or an item is unknown, or the model cannot rank for a user it has not been trained on.
        """
        top = checked("top", top, Count)
        if isinstance(user, Iterable) and not isinstance(user, str):
            users = _ids(user)
            if not users:
                raise UserError("the list of users is empty; give raw ids")
            for one in users:
                self._reader(one, history)
            frames = [self.recommend(one, top=top, candidates=candidates) for one in users]
            for one, frame in zip(users, frames, strict=True):
                frame.insert(0, "user_id", one)
            return pd.concat(frames, ignore_index=True)
        owner, read = self._reader(user, history)
        if candidates is not None:
            asked = list(dict.fromkeys(_ids(candidates)))
            self._check_items(asked, "candidate")
        elif self.retriever is not None:
            # without the user's name where a history was given
            found = self.retriever.recommend(user if history is None else None, history=history, top=self.top_k)
            asked = found["item_id"].tolist()
        else:
            seen = set(read)
            asked = [item for item in self._ranker.numbers if item not in seen]
        scores = self._ranker.scores(owner, read, asked)
        order = np.argsort(-scores, kind="stable")[:top]
        frame = pd.DataFrame({
            "rank": np.arange(1, len(order) + 1),
            "item_id": [asked[n] for n in order],
            "title": [self.items.title(asked[n]) for n in order],
            "score": scores[order],
        })  # fmt: skip
        if self.name == MLLM:
            frame["p_yes"] = 1 / (1 + np.exp(-frame["score"]))
        return frame

    def explain(self, user: str | int | None = None, *, history: Sequence[str] | None = None) -> pd.DataFrame:
        """Return how the preference summary came about that MLLMMSR reads of a user: one row a state, oldest first.

        Returns:
            Columns ``items`` (the raw ids that the state has read on top of the one before) and ``preference``. The
            last row's text stands in the question. Without summaries (``summary_mode: none``) or history: one row.

        Raises:
            UserError: As `recommend`; or the model reads no preference.
        """
        if not isinstance(self._ranker, _MLLMRanker):
            raise UserError(f"{self.name} reads no text of a user; only MLLMMSR's recommendations are explained")
        return pd.DataFrame(self._ranker.chain(self._reader(user, history)[1]), columns=["items", "preference"])

    def preference(self, user: str | int | None = None, *, history: Sequence[str] | None = None) -> str:
        """Return the text that stands for the user in MLLMMSR's question."""
        return str(self.explain(user, history=history)["preference"].iloc[-1])

    def _reader(self, user: str | int | None, history: Sequence[str] | None) -> tuple[str | None, list[str]]:
        """Return the user, None if the dataset has not seen them, and the raw ids of what they have read."""
        if (user is None) == (history is None):
            raise UserError("give either a user of the dataset or a history of item ids")
        if history is None:
            return str(user), self.history(str(user))
        read = _ids(history)
        self._check_items(read, "item of the history")
        return None, read

    def _check_items(self, asked: Sequence[str], what: str) -> None:
        known = self._ranker.numbers
        if unknown := [item for item in asked if item not in known]:
            hint = did_you_mean(unknown[0], known, "give raw item ids")
            raise UserError(
                f"{what} {unknown[0]!r} is unknown to dataset {self.dataset_name} ({len(unknown)} of {len(asked)} "
                f"unknown); {hint}"
            )


class _BaselineRanker:
    """One of RecBole's models, by its own ranking of all items."""

    def __init__(self, loaded: Baseline) -> None:
        self.model, self.dataset, train = loaded
        self.config = config = self.dataset.config
        self.numbers = {str(name): n for n, name in enumerate(train.field2id_token[train.iid_field]) if n}
        item_file = Path(config["data_path"]) / f"{config['dataset']}.item"
        self.items = read_items(item_file.parent, None, train.iid_field) if item_file.is_file() else Items({}, {})

    @torch.no_grad()
    def scores(self, user: str | None, history: Sequence[str], asked: Sequence[str]) -> Any:
        """Return RecBole's scores of the items; ``full_sort_predict`` of one row."""
        data, depth = self.dataset, int(self.config["MAX_ITEM_LIST_LENGTH"] or 0)
        columns = {data.uid_field: torch.tensor([data.field2token_id[data.uid_field][user] if user is not None else 0])}
        if self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            read = torch.tensor([self.numbers[item] for item in history][-depth:], dtype=torch.long)
            if not len(read):
                raise UserError(f"{self.config['model']} reads a history, and this one is empty; give item ids")
            listed = torch.zeros(1, depth, dtype=torch.long)
            listed[0, : len(read)] = read
            columns[data.iid_field + self.config["LIST_SUFFIX"]] = listed
            columns[data.item_list_length_field] = torch.tensor([len(read)])
        elif user is None:
            raise UserError(
                f"{self.config['model']} knows the users it was trained on alone; for a user it has not seen take a "
                "sequential model, such as SASRec, or MLLMMSR"
            )
        found = self.model.full_sort_predict(Interaction(columns).to(self.config["device"])).reshape(-1)
        return found.double().cpu().numpy()[[self.numbers[item] for item in asked]]


class _MLLMRanker:
    """MLLMMSR: what its question says of the user is summarised here, where the store does not know it."""

    def __init__(self, state: Mapping[str, Any], data_path: str, device: torch.device) -> None:
        from recbole_mllm.model.summarizers import make_summary_setup
        from recbole_mllm.summaries.preferences import Preferences
        from recbole_mllm.summaries.user_summaries import SummaryRequests

        config = state["config"]
        settings = Settings.from_config(config)
        if settings.summary.control:
            raise UserError(
                f"this checkpoint was trained under control: {settings.summary.control}, which spoils what is read on "
                "purpose; recommend from the full model's"
            )
        config["retriever_checkpoint"], config["eval_args"]["mode"] = None, {"valid": "uni1", "test": "uni1"}
        self.dataset, train = training_part(config, data_path, device)  # and no retriever is trained
        self.setup = make_summary_setup(config, settings, device)
        self.items = self.setup.items
        described = dict.fromkeys([*map(str, train.field2id_token[train.iid_field][1:]), *self.items.titles])
        self.numbers = {item: n for n, item in enumerate(described)}
        setup = self.setup
        nobody = Preferences({}, SummaryRequests({}, {}), setup.items, setup.style, setup.settings)
        self.model = get_model(MLLM)(config, train, nobody)
        with as_user_error(f"load the checkpoint of {MLLM}", MLLM, config["dataset"]):
            fill(self.model, state)
        self.model.to(device).eval()
        self._preferences: dict[tuple[str, ...], Any] = {}

    def scores(self, user: str | None, history: Sequence[str], asked: Sequence[str]) -> Any:
        """Return the log-odds of Yes."""
        return np.array(self.model.score_items(self._read(history).of("", len(history)), asked), float)

    def chain(self, history: Sequence[str]) -> list[tuple[list[str], str]]:
        """Return the items that each state has read on top of the one before, and its text."""
        found = self._read(history)
        states = [(list(history[s.since : s.seen]), text) for s, text in found.chain("", len(history))]
        return states or [(list(history), found.of("", len(history)))]

    def _read(self, history: Sequence[str]) -> Any:
        """Return the preferences of one history: answers of the store, else generated and stored."""
        from recbole_mllm.summaries.preferences import generate
        from recbole_mllm.summaries.user_summaries import SummaryRequests

        key = tuple(history)
        if key not in self._preferences:
            self._preferences[key] = generate(self.setup, SummaryRequests({"": list(key)}, {"": {len(key)}}))
        return self._preferences[key]


def _ids(given: Any) -> list[str]:
    """Return raw ids as texts; one alone is a list of one."""
    return [str(given)] if isinstance(given, str) or not isinstance(given, Iterable) else list(map(str, given))


def _whole_histories(data: Any) -> dict[str, list[str]]:
    """Return the raw item ids of each user, oldest first, whatever part of the split they are in.

    Where benchmark files stand alone that is the longest list of a user's rows, and the target behind it.
    """
    users, items = (np.asarray(data.field2id_token[f]).astype(str) for f in (data.uid_field, data.iid_field))
    facts = data.facts.whole or data.facts
    if facts.lists is None:
        rows = facts.by_user() if facts.order is not None else np.argsort(facts.users, kind="stable")
        owners, read = facts.users[rows], facts.items[rows]
    else:
        ends = np.cumsum(facts.lengths)
        order = np.lexsort((np.arange(len(ends)), facts.lengths, facts.users))
        last = order[np.flatnonzero(np.diff(facts.users[order], append=-1))]  # each user's longest row
        parts = [np.r_[facts.lists[ends[n] - facts.lengths[n] : ends[n]], facts.items[n]] for n in last]
        owners, read = np.repeat(facts.users[last], list(map(len, parts))), np.concatenate(parts)
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    lists = np.split(items[read], starts[1:])
    return {str(users[owners[start]]): own.tolist() for start, own in zip(starts.tolist(), lists, strict=True)}
