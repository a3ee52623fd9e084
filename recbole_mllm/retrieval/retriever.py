"""A trained RecBole model that scores all items for the rows of our own dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from recbole.utils import ModelType
from torch import Tensor

from recbole_mllm.data.schema import HISTORY_NUMBER, POSITION
from recbole_mllm.errors import UserError


class Retriever:
    """Translates rows and scores between two datasets' internal ids.

    No ``nn.Module``, so that its parameters are never among those the MLLM trains or saves.

    Args:
        model: The trained model.
        dataset: What it was made with.
        identity: Names the model, its settings and what it was trained on.
        ours: The dataset whose rows are to be ranked.

    Raises:
        UserError: The model cannot rank all items, or does not know a user or an item of `ours`.
    """

    def __init__(self, model: Any, dataset: Any, identity: str, ours: Any) -> None:
        name = identity.partition("#")[0]
        if type(model).full_sort_predict is AbstractRecommender.full_sort_predict:
            raise UserError(f"retriever {name} cannot rank all items at once; take a general or sequential model")
        self.model, self.identity, self.ours = model.eval(), identity, ours
        self.train_s = 0.0  # what its training took, whoever trained it
        self.is_sequential = dataset.config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self.fields = dataset.uid_field, dataset.iid_field
        self._users = _places(ours, dataset, ours.uid_field, dataset.uid_field, f"retriever {name} knows no user")
        self._items = _places(ours, dataset, ours.iid_field, dataset.iid_field, f"retriever {name} knows no item")
        self._list = ours.iid_field + ours.config["LIST_SUFFIX"]
        self._depth = int(dataset.config["MAX_ITEM_LIST_LENGTH"])
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def scores(self, rows: Interaction) -> Tensor:
        """Return ``[B, items]`` float32 on the CPU, -inf for what RecBole's full ranking of this model leaves out.

        That is the padding and, for a model that is not sequential, what the user has met before the row's target
        (general_dataloader.py:232, trainer.py:483-486); a sequential model may be asked about met items again.
        """
        found = self.model.full_sort_predict(self._translated(rows).to(self.device))
        out: Tensor = found.reshape(len(rows), -1).float().cpu()[:, self._items]
        if bool(torch.isnan(out).any()):
            raise UserError(f"the retriever {self.identity} scored items with NaN; it cannot be ranked with")
        out[:, 0] = -torch.inf
        if not self.is_sequential:
            for row, met in enumerate(self._met(rows)):
                out[row, met] = -torch.inf
        return out

    def _translated(self, rows: Interaction) -> Interaction:
        """Return the rows in the retriever's ids, with histories as long as it was trained on."""
        ours = self.ours
        user, item = self.fields
        made = {user: self._users[rows[ours.uid_field].cpu()], item: self._items[rows[ours.iid_field].cpu()]}
        if self.is_sequential:
            listed, lengths = self._items[rows[self._list].cpu()], rows[ours.item_list_length_field].cpu()
            kept = lengths.clamp(max=self._depth)
            place = (lengths - kept)[:, None] + torch.arange(self._depth)
            inside = torch.arange(self._depth) < kept[:, None]
            made[self._list] = listed.gather(1, place.clamp(max=listed.shape[1] - 1)).where(inside, 0)
            made[ours.item_list_length_field] = kept
        return Interaction(made)

    def _met(self, rows: Interaction) -> list[list[int]]:
        """Return the items each row's user met before it but for the target, which may be met again."""
        ours = self.ours
        ids, name = ours.field2token_id[ours.iid_field], ours.history_names.name
        columns = zip(*(rows[f].tolist() for f in (HISTORY_NUMBER, POSITION, ours.iid_field)), strict=True)
        return [list({ids[i] for i in ours.histories[name(h)][:place]} - {target}) for h, place, target in columns]


def _places(ours: Any, theirs: Any, field: str, their_field: str, complaint: str) -> Tensor:
    """Return their internal id of each of our internal ids; 0 is the padding of both."""
    known = theirs.field2token_id[their_field]
    raw = np.asarray(ours.field2id_token[field]).astype(str)
    unknown = [name for name in raw[1:] if name not in known]
    if unknown:
        raise UserError(
            f"{complaint} {unknown[0]!r} ({len(unknown)} of {len(raw) - 1} unknown); it must be trained on this "
            "dataset with the same filters"
        )
    return torch.tensor([0, *(int(known[name]) for name in raw[1:])])
