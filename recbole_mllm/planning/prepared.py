"""From RecBole's Config to everything a plan counts over: rows, candidates, titles, wording; no model, no log file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.utils import init_seed

from recbole_mllm.keys import check_keys
from recbole_mllm.model.stages import make_stage
from recbole_mllm.quick_start import read_and_split
from recbole_mllm.settings import Settings
from recbole_mllm.summaries.prepare import Stage
from recbole_mllm.summaries.users import Plan


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that has not begun; `device` is the kind it would run on."""

    config: Any
    settings: Settings
    stage: Stage
    plan: Plan
    dataset: Any
    loaders: dict[str, Any]
    history_names: Any
    items: Any
    device: torch.device

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to fine-tune."""
        return self.settings.lora.finetune != "none"


def prepare(config: Any, device: torch.device) -> Prepared:
    """Read the dataset, split it and draw its candidates, as a run of `config` does.

    Raises:
        UserError: The configuration asks for what cannot be; nothing has been written.
    """
    config["show_progress"], config["state"] = False, "ERROR"
    settings = Settings.from_config(config)
    settings.ranking.check_modes(config["eval_args"]["mode"])
    init_seed(config["seed"], config["reproducibility"])  # as a run: a random split draws from it
    check_keys(config.external_config_dict, "the configuration")
    dataset, (train, valid, test) = read_and_split(config)
    own = train._dataset
    items, names = np.asarray(own.field2id_token[own.iid_field]).astype(str), own.history_names
    stage = make_stage(config, settings, device)
    loaders = {"train": train, "valid": valid, "test": test}
    return Prepared(config, settings, stage, Plan(own.histories, own.positions), dataset, loaders, names, items, device)
