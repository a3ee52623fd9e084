"""How the bundled tiny MLLM was made; `tools/train_tiny_mllm.py` runs it."""
