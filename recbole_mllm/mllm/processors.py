"""Load a model's processor also where torchvision is absent: only its videos need it, and this project shows none.

Qwen-VL, SmolVLM and InternVL processors of transformers 5.23 insist on a video processor, whose class in turn insists
on torchvision, and SmolVLM's on num2words, to write out a video's length. Their image processors have PIL versions that
do without. So a stand-in takes the video processor's place, for the duration of one `from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from recbole_mllm.errors import UserError

REFUSALS = (ValueError, ZeroDivisionError, OverflowError)  # what image processors raise at sizes they cannot take
Size = tuple[int, int]


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

    # SmolVLM's chat template passes these on, to nobody
    num_frames: int = 0
    fps: int = 0
    model_input_names: tuple[str, ...] = ()
    _auto_class: None = None

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write nothing."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Refuse."""
        raise UserError("videos need torchvision: pip install torchvision")


def load_processor(source: str, **options: Any) -> Any:
    """Return the processor of `source`, as ``AutoProcessor.from_pretrained`` does."""
    with _without_videos():
        return AutoProcessor.from_pretrained(source, **options)


@contextmanager
def _without_videos() -> Iterator[None]:
    """Let processors be made with a `NoVideos` for their video processor, and SmolVLM's without num2words."""
    stock = ProcessorMixin.check_argument_for_proper_class

    def check(self: Any, name: str, argument: Any) -> Any:
        return NoVideos if isinstance(argument, NoVideos) else stock(self, name, argument)

    # the modules themselves: `transformers.AutoVideoProcessor` is a stub where torchvision is absent
    video = import_module("transformers.models.auto.video_processing_auto").AutoVideoProcessor
    smolvlm = import_module("transformers.models.smolvlm.processing_smolvlm")
    with ExitStack() as stack:
        stack.enter_context(changed(video, "from_pretrained", staticmethod(lambda *_, **__: NoVideos())))
        stack.enter_context(changed(ProcessorMixin, "check_argument_for_proper_class", check))
        stack.enter_context(changed(smolvlm, "num2words", smolvlm.num2words or str))
        yield


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give `owner` another attribute `name` for the while, and its own back, descriptor and all."""
    stock = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, stock)
