"""What every command line here shares: complaints of one line, and what they mean as an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from recbole_mllm.errors import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other mistake's; options are never abbreviated."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> Any:
        """Complain as for every other mistake."""
        raise UserError(f"{message}; see --help")


def exit_code(run: Callable[[list[str]], int], words: Sequence[str]) -> int:
    """Return what `run` returns; 2 for a user's mistake, told in one line (``--debug`` shows the traceback)."""
    debug = "--debug" in words
    try:
        return run([word for word in words if word != "--debug"])
    except UserError as error:
        if debug:
            raise
        print(f"recbole-mllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("recbole-mllm: stopped; what was finished is kept", file=sys.stderr)
        return 1
