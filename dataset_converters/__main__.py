"""``python -m dataset_converters NAME --raw DIR --out DIR``."""

import sys

from recbole_mllm.common.console import exit_code

from .options import main

if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
