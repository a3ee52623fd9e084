# SHIM * -> recbole_mllm.model.row_scoring
import sys

from recbole_mllm.model.row_scoring import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.model.row_scoring"]
