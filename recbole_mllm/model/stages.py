# SHIM * -> recbole_mllm.model.summarizers
import sys

from recbole_mllm.model.summarizers import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.model.summarizers"]
