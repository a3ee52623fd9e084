# SHIM * -> recbole_mllm.mllm.scoring
import sys

from recbole_mllm.mllm.scoring import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.scoring"]
