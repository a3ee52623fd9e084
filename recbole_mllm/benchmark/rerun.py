"""Do a recorded run again from its record alone, in a process of its own, and hold the numbers against each other.

The repetition is written below ``reruns/`` in the results folder: it never touches the leaderboard or its records.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_mllm.benchmark.jobs import LAYOUT
from recbole_mllm.benchmark.process import LOG, WORKER, claim, failure, heartbeat, run_child, write_order
from recbole_mllm.benchmark.records import (
    RECORDS,
    WHO,
    RunRecord,
    changed_data,
    latest,
    plain_json,
    read_records,
    records_of,
)
from recbole_mllm.common.config import every_key
from recbole_mllm.common.errors import UserError, did_you_mean
from recbole_mllm.common.model_names import TINY, identity_of, is_same, pinned
from recbole_mllm.common.resources import MLLM, PROPERTIES
from recbole_mllm.common.settings import MLLMSettings
from recbole_mllm.common.yaml_files import read_mapping
from recbole_mllm.demo.builtin import is_builtin

RERUNS = "reruns"

TOLERANCE = 0.01
"""How far a metric may be off where library versions or the machine differ; on the same ones it must be equal."""

_DERIVED = {
    *("MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "device", "single_spec", "local_rank", "valid_metric_bigger"),
    *("valid_neg_sample_args", "test_neg_sample_args", "benchmark_defaults", "per_model", "model", "dataset"),
    *("data_path", "checkpoint_dir", "retriever_dir", "note"),
}
"""Keys of a finished Config that RecBole works out itself, or that say where the first run's files lay."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a repetition showed, one sentence a line; `agree` is whether every number holds."""

    agree: bool
    lines: tuple[str, ...]


def find_run(run_id: str, output: Path | None = None, root: Path = Path("results")) -> tuple[Path, RunRecord]:
    """Return the results folder and the latest record of `run_id`, looked for in `output`, else all over `root`.

    Raises:
        UserError: No record has this id, several folders have one, or the run has no numbers.
    """
    if output is not None and not (output / RECORDS).is_file():
        raise UserError(f"{output} holds no {RECORDS}; give the folder a benchmark wrote")
    files = [output / RECORDS] if output is not None else sorted(root.rglob(RECORDS))
    known = {file.parent: latest(read_records(file)) for file in files if RERUNS not in file.parts}
    found = [folder for folder, records in known.items() if run_id in records]
    if not found:
        names = (name for records in known.values() for name in records)
        hint = did_you_mean(run_id, names, "the ids are in runs.jsonl and below runs/")
        raise UserError(f"no run {run_id!r} in {output or root}; {hint}")
    if len(found) > 1:
        raise UserError(f"run {run_id} is in {', '.join(map(str, found))}; say which with --output_dir")
    record = known[found[0]][run_id]
    if not record.ok:
        raise UserError(f"run {run_id} has no numbers to compare with: {record.status}; run the benchmark again")
    return found[0], record


def rerun(
    folder: Path,
    record: RunRecord,
    data_path: str | None = None,
    worker: Sequence[str] = WORKER,
    tell: Callable[[str], None] = print,
) -> Agreement:
    """Run what `record` of the results folder `folder` describes once more and compare.

    Args:
        folder: Where the record stands.
        record: A finished run's.
        data_path: Where the datasets lie now; default: where they lay then.
        worker: As for `runner.benchmark`.
        tell: Takes each line for the user while the run is at work.
    """
    output = folder.resolve() / RERUNS
    place = output / "runs" / record.run_id
    order = order_of(record, output, data_path)
    if not record.fusion:  # whose scores are saved
        _check_weights(record)
        _check_data(record, Path(order["overrides"]["data_path"]) / record.dataset)
    tell(f"running {record.run_id} again in {folder / RERUNS / 'runs' / record.run_id}")
    stop = threading.Event()
    with claim(place, stop, lambda process: tell(f"process {process} is still at this; waiting for it")) as lock:
        known = len(records_of(output / RECORDS, record.run_id))
        code = run_child([*worker, write_order(place, order)], place, lock, stop, heartbeat(tell))
    again = records_of(output / RECORDS, record.run_id)
    if len(again) == known:
        return Agreement(False, (f"it failed this time: {failure(place / LOG, code)} (log: {place / LOG})",))
    return compare(record, again[-1])


def _check_weights(record: RunRecord) -> None:
    """Refuse to repeat a run with other weights than it had.

    Raises:
        UserError: A local model's files are others now, or are gone.
    """
    for said, weights, now in weights_now(record, {}):
        if not is_same(weights, now):
            raise UserError(
                f"{said} was {weights} and is {now}: a run of other weights is another run; put the earlier ones back, "
                "or run the benchmark again"
            )


def _check_data(record: RunRecord, folder: Path) -> None:
    """Refuse to repeat a run on other data than it had, which lie in `folder` now."""
    if changed := changed_data(record, folder):
        raise UserError(
            f"{folder / changed[0]} has changed since {record.run_id}: a run on other data is another run; put the "
            "earlier file back, or run the benchmark again"
        )


def weights_now(record: RunRecord, changes: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield each model that a run asked, in words, with the weights it had and those it would have now.

    Not those that its config does not name: item features of texts may be an encoder's alone.

    Args:
        record: The run's.
        changes: Keys that its config would have now, such as a revision that is open again.
    """
    ours = read_mapping(PROPERTIES / "model" / "MLLMMSR.yaml")
    models = MLLMSettings.from_config({**ours, "mllm": TINY, **record.config, **changes})
    for key, weights in record.weights.items():
        if key == "feature_encoder":
            if encoder := record.config.get(key):  # a fused record's own config has none
                yield f"{key} {encoder}", weights, identity_of(pinned(encoder))
        elif record.config.get(key) or record.config.get("mllm"):
            yield f"{key} {models.name(key)}", weights, models.identity(key)


def order_of(record: RunRecord, output: Path, data_path: str | None = None) -> dict[str, Any]:
    """Return the worker's order that repeats `record`: its whole configuration, no file of the first run's.

    What is fused is made again from the scores that its parts have saved in the folder above `output`.

    Raises:
        UserError: The dataset is no longer where it was.
    """
    who = {key: getattr(record, key) for key in WHO}
    who["output_dir"] = str(output)
    if record.fusion:
        return {**who, "parts": list(record.fusion["parts"]), "results": str(output.parent)}
    defaults = {key: value for key, value in record.config.items() if key in every_key() - _DERIVED}
    if record.config.get("item_features"):
        defaults.setdefault("mllm", TINY)  # the default when a record that names none was made
    # its own section is in its keys already, a retriever's is not
    others = {name: keys for name, keys in (record.config.get("per_model") or {}).items() if name != record.model}
    defaults |= {"per_model": others} if others else {}
    negatives = defaults.get("train_neg_sample_args")
    if isinstance(negatives, Mapping) and negatives.get("distribution") == "none":
        defaults["train_neg_sample_args"] = None  # what RecBole takes, and writes differently (configurator.py:538-560)
    home = Path(data_path) if data_path else Path(str(record.config["data_path"])).parent
    bundled = is_builtin(record.dataset) or record.dataset == "ml-100k"
    if not (bundled or (home / record.dataset).is_dir()):
        raise UserError(f"dataset {record.dataset!r} is no longer in {home}; say where it is with --data_path=DIR")
    order = {
        **who,
        "config_files": [],
        "defaults": defaults,
        "overrides": {**_over(home / record.dataset / "dataset.yaml", defaults), "data_path": str(home.resolve())},
        "limit_users": record.config.get("limit_users"),
        "keep_valid": False,  # what is fused are a benchmark's runs
    }
    if threads := re.search(r"(\d+) threads", record.versions.get("machine", "")):
        order["threads"] = min(int(threads[1]), os.cpu_count() or 1)  # sums depend on how many there are
    return dict(plain_json(order))


def _over(own: Path, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the `recorded` keys that a dataset's ``dataset.yaml`` would win over."""
    said = read_mapping(own) if own.is_file() else {}
    return {key: recorded[key] for key in said if key in recorded and key not in LAYOUT}


def compare(before: RunRecord, now: RunRecord) -> Agreement:
    """Compare two runs of one configuration metric by metric."""
    then, later = (
        {**run.versions, "device": run.device, "commit": run.commit, "processes": str(run.world_size)}
        for run in (before, now)
    )
    changes = [
        f"  {name}: {then.get(name) or 'unknown'} then, {later.get(name) or 'unknown'} now"
        for name in sorted(then.keys() | later.keys())
        if then.get(name) != later.get(name)
    ]
    rule = f"not the same surroundings, so each metric may differ by {TOLERANCE}:"
    lines = [rule if changes else "same machine and versions: every metric must be equal", *changes]
    if before.candidates != now.candidates:
        why = "the dataset's files, or the candidates file, are not those of the first run"
        if before.candidate_rules != now.candidate_rules:
            why = "an older version drew them by other rules (on benchmark files, under popN, and for close times)"
        sets = f"{before.candidates or 'none'} then, {now.candidates or 'none'} now"
        lines.append(f"the candidates differ ({sets}): {why}")
    lines.append(f"test: {before.protocol}")
    if now.protocol != before.protocol:
        lines.append(f"now:  {now.protocol}")
    names = list(dict.fromkeys([*before.metrics, *now.metrics]))
    width, agreeing = max(map(len, names)), 0
    for name in names:
        one, two = before.metrics.get(name, math.nan), now.metrics.get(name, math.nan)
        holds = abs(one - two) <= (TOLERANCE if changes else 0.0)  # never where one is missing
        lines.append(f"{name:<{width}}  {one:.6f}  {two:.6f}  {'agrees' if holds else 'DISAGREES'}")
        agreeing += holds
    if agreeing < len(names) and _dropout_by_content(before) and not _dropout_by_content(now):
        lines.append(
            f"version {before.versions['recbole_mllm']} drew the dropout of fine-tuning from what a row holds, today's "
            "is torch's own: such a run agrees with lora_dropout: 0 alone"
        )
    agree = before.candidates == now.candidates and agreeing == len(names)
    lines.append(f"{agreeing} of {len(names)} metrics agree: the run is {'' if agree else 'NOT '}reproduced")
    return Agreement(agree, tuple(lines))


def _dropout_by_content(run: RunRecord) -> bool:
    """Return whether an MLLM was fine-tuned with dropout masks that version 0.1.0 keyed by content."""
    tuned = run.model == MLLM and run.config.get("finetune") in ("lora", "qlora") and run.config.get("epochs") != 0
    return tuned and run.versions.get("recbole_mllm") == "0.1.0" and (run.config.get("lora_dropout") or 0) > 0
