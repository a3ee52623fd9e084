"""``recbole-mllm export``: from a run to a folder that transformers and servers load."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recbole_mllm.endpoints import is_server
from recbole_mllm.errors import UserError
from recbole_mllm.files import EXPORT, check_folder, outputs_of, publish, publish_new, remove_file, staged, write_text
from recbole_mllm.mllm.exporting import CONFIGS, Question, write_decision, write_model
from recbole_mllm.mllm.hf import HFModel
from recbole_mllm.mllm.quantization import dequantized
from recbole_mllm.mllm.tuning import check_finetune, load_trained_state, tune
from recbole_mllm.model.stages import load_style
from recbole_mllm.settings import MLLMSettings, Settings
from recbole_mllm.training.checkpoint import LAST, read_checkpoint
from recbole_mllm.training.exported import readme

_WRITER = "recbole-mllm"
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class _Run:
    """A checkpoint with what its run was asked for; `base` names the weights it adapts, `dtype` their precision."""

    path: Path
    checkpoint: Mapping[str, Any]
    settings: Settings
    base: str
    dtype: str


def export(run: str, out: Path, *, merge: bool) -> Path:
    """Write what `run` trained into `out`, all of it or nothing.

    Args:
        run: A checkpoint (``.pth``), the folder beside it, a benchmark run's folder, or its id under ``results/``.
        out: The folder; the files of an earlier export there are replaced, all others stay.
        merge: Whether an adapter is merged into its base model, so that the folder stands alone.

    Raises:
        UserError: There is no such checkpoint, its base model is not the one found now, or `out` is
            something else (`check_folder`).
    """
    path = find_checkpoint(run)
    check_folder(out, EXPORT, "--out", inputs=(path,))
    found = _read(path)
    folder = Path(os.path.realpath(out))
    is_new = not folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with staged(folder.parent if is_new else folder, folder.name) as stage:
        _write(found, stage, merge)
        if is_new:
            publish_new(stage, folder)
        else:
            publish(stage, folder, EXPORT)
    return out


def find_checkpoint(run: str) -> Path:
    """Return the checkpoint that `run` names.

    Raises:
        UserError: There is none.
    """
    given = Path(run)
    if not run.strip():
        raise UserError("export wants a checkpoint (FILE.pth), a run's folder, or its id under results/; it got ''")
    if given.is_file():
        return given
    if given.is_dir():
        beside = given.with_name(f"{given.resolve().name}.pth")
        if beside.is_file():
            return beside
        return _kept(given)
    folders = sorted(Path("results").glob(f"*/runs/{run}")) if given.name == run else []
    if len(folders) == 1:
        return _kept(folders[0])
    what = "names several runs: " + ", ".join(map(str, folders)) if folders else "is neither a file nor a run's id here"
    raise UserError(f"{run!r} {what}; give a checkpoint (FILE.pth) or a folder such as results/demo/runs/RUN_ID")


def _kept(folder: Path) -> Path:
    """Return the best checkpoint of a run's folder."""
    for place in (folder / "saved", folder):
        found = [path for path in place.glob("MLLMMSR*.pth") if not path.name.endswith(LAST)]
        if found:
            return max(found, key=lambda path: path.stat().st_mtime)
    if (folder / "adapter_config.json").is_file() or (folder / "trained.safetensors").is_file():
        raise UserError(f"beside {folder} there is no {folder.name}.pth, which says how the prompts are worded")
    raise UserError(f"no checkpoint of MLLMMSR is kept in {folder}; run that model again, or give a FILE.pth")


def _read(path: Path) -> _Run:
    checkpoint = read_checkpoint(path, _CPU)
    config = checkpoint["config"]
    if config["model"] != "MLLMMSR":
        raise UserError(f"{path} is a checkpoint of {config['model']}; only MLLMMSR is exported")
    settings = Settings.from_config(config)
    if is_server(settings.mllm.mllm):
        raise UserError(f"{path}: its model is behind a server, so there is nothing here to export")
    base = str((checkpoint.get("other_parameter") or {}).get("base", ""))
    base, _, dtype = base.removesuffix(":nf4").rpartition(":")
    return _Run(path, checkpoint, settings, base, dtype)


_IN_ONE_PLACE = {"device_map": None, "max_memory": None, "offload_folder": None}


def _load(run: _Run, merge: bool) -> HFModel:
    """Return the model as it was trained, on the CPU.

    A base in four bits is loaded in its own precision, which is all an adapter's folder takes; to be merged, it is
    what those four bits stand for, as that is what the adapter was trained on.
    """
    settings = MLLMSettings.from_config({**asdict(run.settings.mllm), "dtype": run.dtype, **_IN_ONE_PLACE})
    lora = run.settings.lora
    four_bit = merge and lora.finetune == "qlora"
    if four_bit:
        check_finetune(lora, _CPU)
    mllm = HFModel(settings.mllm, settings, _CPU, four_bit=four_bit)
    if mllm.identity.removesuffix(":nf4") != f"{run.base}:{run.dtype}":
        raise UserError(f"{run.path} belongs to {run.base}, not to {mllm.identity}; put that model back in its place")
    if four_bit:
        mllm.replace_model(dequantized(mllm.model))
    if lora.finetune != "none":
        mllm.replace_model(tune(mllm.model, lora, 0))
        load_trained_state(mllm.model, dict(run.checkpoint["state_dict"]))
    mllm.model.eval()
    return mllm


def _write(run: _Run, folder: Path, merge: bool) -> None:
    mllm = _load(run, merge)
    recommend = run.settings.recommend
    question = Question(load_style(run.settings), recommend.prompt_order == "item-first", recommend.use_image)
    name = run.settings.mllm.mllm
    kind = write_model(mllm, name, folder, merge=merge)
    why = write_decision(mllm, question, folder)
    if kind == "adapter":  # with a config.json, transformers would look for whole weights here
        for config in CONFIGS:
            remove_file(folder / config)
    if why:
        logging.getLogger().warning(
            f"no decision_template.jinja: {why}; servers that give logprobs score it all the same"
        )
    about = {
        "written_by": _WRITER,
        "kind": kind,
        "checkpoint": run.path.name,
        "base": name,
        "base_identity": run.base,
        "dtype": run.dtype,
        "finetune": run.settings.lora.finetune,
        "prompt_style": question.style.name,
        "prompt_order": recommend.prompt_order,
        "use_image": recommend.use_image,
        "decision_template": not why,
    }
    write_text(folder / "README.md", readme(about, question.style, why))
    write_text(folder / EXPORT.manifest, json.dumps(about | {"outputs": outputs_of(folder)}, indent=2) + "\n")
