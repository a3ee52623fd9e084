# SHIM * -> recbole_mllm.features.item_vectors
import sys

from recbole_mllm.features.item_vectors import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.features.item_vectors"]
