# SHIM * -> recbole_mllm.recbole_patches.hooks
import sys

from recbole_mllm.recbole_patches.hooks import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.recbole_patches.hooks"]
