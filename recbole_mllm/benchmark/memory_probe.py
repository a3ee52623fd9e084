"""The command ``probe-memory``: a model answers `memory_questions` through the dataset's store."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

from recbole.utils import init_seed

from recbole_mllm.benchmark.memory_questions import COUNT, judge, memory_file, questions_of, read_memory, verdict
from recbole_mllm.common.errors import UserError
from recbole_mllm.common.files import write_text
from recbole_mllm.common.settings import Settings
from recbole_mllm.data.histories import user_of
from recbole_mllm.data.schema import item_file
from recbole_mllm.mllm.interface import Decoding
from recbole_mllm.model.summarizers import make_summary_setup
from recbole_mllm.quick_start import read_and_split
from recbole_mllm.summaries.generator import user_generator
from recbole_mllm.summaries.store import opened_store

_TOKENS = 32  # of an answer: a title


def probe_memory(config: Any, count: int = COUNT) -> list[str]:
    """Ask the model that writes the user summaries of a run of `config`; return what it shows, for people.

    Raises:
        UserError: The model cannot be loaded, or the dataset has nothing to ask about.
    """
    init_seed(config["seed"], config["reproducibility"])
    for key, value in {"use_image": False, "item_summary": "text", "control": None, "summarize": "auto"}.items():
        config[key] = value  # nothing is summarised, and no image shown
    settings = Settings.from_config(config)
    _, (train, *_) = read_and_split(config)
    setup = make_summary_setup(config, settings, config["device"])
    histories = {user_of(name): items for name, items in train._dataset.histories.items()}
    questions = questions_of(str(config["dataset"]), setup.folder, histories, config["seed"], count)
    if not questions:
        raise UserError(f"{item_file(setup.folder)} has no titles to ask about, and no user's items are known")
    decoding = Decoding(_TOKENS, rules=setup.summarizers.user_rules)
    with closing(opened_store(setup.folder)) as store:
        generator = replace(user_generator(setup, store), kind="probe", decoding=decoding)
        with generator.progress(len(questions)):
            answers = generator.answer([question.prompt for question in questions])
    model, findings = settings.mllm.identity("user_summarizer"), judge(questions, answers)
    path = memory_file(setup.folder)
    known = {"seed": config["seed"], "findings": [asdict(finding) for finding in findings]}
    write_text(path, json.dumps(read_memory(path) | {model: known}, indent=2) + "\n")
    return [verdict(model, findings), f"written: {path}; a leaderboard of this model on this dataset says so too"]
