# SHIM * -> recbole_mllm.recbole_patches.list_column
import sys

from recbole_mllm.recbole_patches.list_column import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.recbole_patches.list_column"]
