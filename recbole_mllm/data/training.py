# SHIM * -> recbole_mllm.data.dataloader
import sys

from recbole_mllm.data.dataloader import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.data.dataloader"]
