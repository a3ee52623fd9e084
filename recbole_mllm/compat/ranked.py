# SHIM * -> recbole_mllm.recbole_patches.processes
import sys

from recbole_mllm.recbole_patches.processes import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.recbole_patches.processes"]
