# SHIM * -> recbole_mllm.model.random_model
import sys

from recbole_mllm.model.random_model import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.model.random_model"]
