# SHIM * -> recbole_mllm.mllm.lora
import sys

from recbole_mllm.mllm.lora import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.lora"]
