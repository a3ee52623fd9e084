# SHIM * -> recbole_mllm.cli.arguments
import sys

from recbole_mllm.cli.arguments import *  # noqa: F403

sys.modules[__name__] = sys.modules["recbole_mllm.cli.arguments"]
