"""The demo world and the tiny MLLM that lives in it."""
