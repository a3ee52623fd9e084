"""Tiny, randomly initialised models of real architectures with real processors, built in a folder at test time."""

from tiny_models.gemma import gemma3, paligemma
from tiny_models.idefics import idefics3, smolvlm
from tiny_models.llava import internvl, llama, llava, llava_next
from tiny_models.pairs import PAIRS
from tiny_models.qwen import qwen2_5_vl, qwen2_vl, qwen3_vl
from tiny_models.text import TEXT_FAMILIES

FAMILIES = (llama, llava, llava_next, qwen2_vl, qwen2_5_vl, qwen3_vl, idefics3, smolvlm, gemma3, paligemma, internvl)

__all__ = ["FAMILIES", "PAIRS", "TEXT_FAMILIES", *(build.__name__ for build in FAMILIES)]
