# SHIM * -> recbole_mllm.training.model_export
import sys

from recbole_mllm.training.model_export import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.training.model_export"]
