"""``python -m dataset_converters NAME --raw DIR --out DIR``."""

import sys

from dataset_converters.cli import main
from recbole_mllm.arguments import exit_code

if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
