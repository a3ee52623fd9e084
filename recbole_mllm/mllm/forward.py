# SHIM * -> recbole_mllm.mllm.backbone
import sys

from recbole_mllm.mllm.backbone import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.backbone"]
