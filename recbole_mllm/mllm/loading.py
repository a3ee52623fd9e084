"""Load a model with its processor by transformers' auto classes: what its name means, and what names its weights."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    ProcessorMixin,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from recbole_mllm.common.errors import UserError, first_line
from recbole_mllm.common.model_names import gguf_of, identity_of, revision_of, source_of
from recbole_mllm.common.resources import TRANSFORMERS, is_usable_transformers
from recbole_mllm.mllm.families import language_part
from recbole_mllm.mllm.placement import check_room

REFUSALS = (ValueError, ZeroDivisionError, OverflowError)  # what image processors raise at sizes they cannot take
# What reading a folder that is damaged, or no model's, may raise
UNREADABLE = (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model in evaluation mode with what turns prompts into its inputs; `processor` is None for a text-only one."""

    model: Any
    tokenizer: Any
    processor: Any | None
    identity: str


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype `name` stands for; ``auto`` is float32 on CPU and bfloat16 elsewhere."""
    auto = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = auto if name == "auto" else getattr(torch, name)
    return dtype


def family_of(name: str, *, trust_remote_code: bool = False) -> str | None:
    """Return the family (``model_type``) that the configuration of `name` says; None where there is none to read."""
    source = source_of(name)
    if gguf_of(source) is not None:
        return None
    try:
        options = {"trust_remote_code": trust_remote_code, "revision": revision_of(name)}
        return str(AutoConfig.from_pretrained(source, **options).model_type)
    except UNREADABLE:  # said when it is loaded
        return None


# --- loading ---


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
    four_bit: bool = False,
    placed: Mapping[str, Any] | None = None,
    weights: bool = True,
) -> Loaded:
    """Load `name` for inference, its linear layers in four bits where asked for.

    `placed` says where its layers go (see `placement.placement`); else all go to `device`. Without `weights` only
    small files are read, and the model is on the meta device: it has shapes and no numbers.

    Raises:
        UserError: The name is neither a folder nor a model id that can be had, no auto class knows it, or it has not
            all of its weights; or this transformers would not read its images.
    """
    if not is_usable_transformers(transformers.__version__):
        raise UserError(
            f"transformers {transformers.__version__} is too old here: models might not read their images; pip install "
            f"'transformers>={TRANSFORMERS}'"
        )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # what `accelerate launch` sets for FSDP: all but the first process would wait for Accelerate to send them weights
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    source = source_of(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision_of(name)}
    if (file := gguf_of(source)) is not None:
        source, options["gguf_file"] = str(file.parent), file.name
    try:
        config = AutoConfig.from_pretrained(source, **options)
        sees = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and file is None
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        extra = (quantized(dtype, device) if four_bit else {}) | dict(placed or {})
        if weights:
            # the reader of a .gguf file takes tqdm's own bar, not transformers', which is silent
            reader = import_module("transformers.modeling_gguf_pytorch_utils") if file is not None else None
            with changed(reader, "tqdm", transformers_logging.tqdm) if reader else nullcontext():
                model, found = auto.from_pretrained(source, dtype=dtype, output_loading_info=True, **options, **extra)
            _check_weights(name, model.eval(), found["missing_keys"])
            model = model if four_bit or placed else model.to(device)
            check_room(model, device)
        else:
            with torch.device("meta"):
                model = auto.from_config(config, trust_remote_code=trust_remote_code).eval()
            model.tie_weights()
        processor = load_processor(source, **options) if sees else None
        tokenizer = processor.tokenizer if processor is not None else AutoTokenizer.from_pretrained(source, **options)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"model {name!r} cannot be loaded: {_reason(error, Path(source))}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for module in model.modules():
        # bitsandbytes 0.50 would repack weights for CPUs with AVX512-BF16 at their first use in evaluation: repacked,
        # they compute in bfloat16 whatever is asked for and have no gradient, so that training after it learns nothing
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    return Loaded(model, tokenizer, processor, identity_of(name))


def quantized(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs for QLoRA's 4-bit NormalFloat; head and vision side stay as they are."""
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", r".*(?:vision|visual|image|projector|connector|merger)[^.]*"],
    )
    return {"quantization_config": how, "device_map": {"": device}}


def _check_weights(name: str, model: nn.Module, missing: Collection[str]) -> None:
    """Refuse a language model with weights left at random, which would answer anything; warn of others.

    A vision tower may have parts that are built and never run (SigLIP's head), and that no file holds.

    Raises:
        UserError: There are such weights.
    """
    if not missing:
        return
    listed = f"{len(missing)} of its weights are in no file ({', '.join(sorted(missing)[:3])}, ...)"
    part, _ = language_part(model)
    if any(key.startswith(f"{part}." if part else "") or "lm_head" in key for key in missing):
        raise UserError(f"model {name!r} is not whole: {listed}, or have other names than its config.json asks for")
    logging.getLogger().warning(f"model {name!r}: {listed} and are left at random; is the download complete?")


def _reason(error: Exception, folder: Path) -> str:
    """Return why a model cannot be loaded, and what to give in its place."""
    with suppress(OSError, ValueError, AttributeError):
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = about.get("base_model_name_or_path")
        return f"it is an adapter of {base!r}, no whole model; `recbole-mllm export RUN --out DIR --merge` writes one"
    reason = first_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        return f"{reason}; take a smaller model, or dtype: bfloat16"
    if isinstance(error, ImportError):
        return f"{reason.partition('. ')[0]}; install what it asks for"
    if isinstance(error, OSError | ValueError):
        return f"{reason.rstrip('.')}; give a hub id, a local folder, a .gguf file, or `tiny`"
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights have other shapes than its config.json says"
    return f"its files are damaged or do not belong together ({type(error).__name__}: {reason})"


# --- processors ---


def load_images_processor(name: str, *, trust_remote_code: bool = False) -> Any:
    """Return the processor of `name`, without its weights; None for a model of text alone or one that cannot be had."""
    with suppress(UserError, *UNREADABLE):  # said when it is loaded
        if family_of(name, trust_remote_code=trust_remote_code) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return load_processor(source_of(name), trust_remote_code=trust_remote_code, revision=revision_of(name))
    return None


def refused_sizes(processor: Any, sizes: Iterable[Size]) -> dict[Size, str]:
    """Return the reason of each (width, height) of an image, in pixels, that `processor` refuses."""
    refused: dict[Size, str] = {}
    for size in sizes:
        try:
            processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
        except REFUSALS as error:
            refused[size] = " ".join(str(error).split()) or type(error).__name__
    return refused


class NoVideos(dict[str, Any]):
    """Stands where a processor wants its video processor; a dict, as a processor prints its parts as JSON."""

    num_frames = fps = 0  # SmolVLM's chat template passes these on, to nobody
    model_input_names: tuple[str, ...] = ()
    _auto_class = None

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write nothing."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refuse."""
        raise UserError("videos need torchvision: pip install torchvision")


def load_processor(source: str, **options: Any) -> Any:
    """Return the processor of `source`, as ``AutoProcessor.from_pretrained`` does, also without torchvision.

    Qwen-VL, SmolVLM and InternVL processors of transformers 5.23 insist on a video processor, whose class insists on
    torchvision, and SmolVLM's on num2words. Only videos need them, and none is shown here: `NoVideos` takes the place.
    """
    stock = ProcessorMixin.check_argument_for_proper_class

    def check(self: Any, name: str, argument: Any) -> Any:
        return NoVideos if isinstance(argument, NoVideos) else stock(self, name, argument)

    # the modules themselves: `transformers.AutoVideoProcessor` is a stub where torchvision is absent
    video = import_module("transformers.models.auto.video_processing_auto").AutoVideoProcessor
    smolvlm = import_module("transformers.models.smolvlm.processing_smolvlm")
    with (
        changed(video, "from_pretrained", staticmethod(lambda *_, **__: NoVideos())),
        changed(ProcessorMixin, "check_argument_for_proper_class", check),
        changed(smolvlm, "num2words", smolvlm.num2words or str),
    ):
        return AutoProcessor.from_pretrained(source, **options)


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give `owner` another attribute `name` for the while, and its own back, descriptor and all."""
    stock = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, stock)
