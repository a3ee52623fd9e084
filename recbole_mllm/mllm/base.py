# SHIM * -> recbole_mllm.mllm.interface
import sys

from recbole_mllm.mllm.interface import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.mllm.interface"]
