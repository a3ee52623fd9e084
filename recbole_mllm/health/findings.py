# SHIM * -> recbole_mllm.inspect.findings
import sys

from recbole_mllm.inspect.findings import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.inspect.findings"]
