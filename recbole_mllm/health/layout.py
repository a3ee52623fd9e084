# SHIM * -> recbole_mllm.inspect.measure
import sys

from recbole_mllm.inspect.measure import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.inspect.measure"]
