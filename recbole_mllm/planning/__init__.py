"""What a run would cost, counted before anything runs: prompts, tokens, FLOPs, bytes, memory, hours."""
