"""The command line: ``python run_recbole_mllm.py …`` and ``recbole-mllm …`` are this."""

from recbole_mllm.cli.main import main

__all__ = ["main"]
