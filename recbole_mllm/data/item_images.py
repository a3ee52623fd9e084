# SHIM * -> recbole_mllm.data.images
import sys

from recbole_mllm.data.images import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.data.images"]
