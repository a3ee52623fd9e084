"""Before anything else: threads that wait without spinning, no network, and RecBole made to run."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

import recbole_mllm  # noqa: F401  (registers itself with RecBole)
