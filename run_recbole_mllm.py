"""Run recbole_mllm from a checkout; ``recbole-mllm`` is the same program once installed."""

import sys

from recbole_mllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
