"""The only home of transformers and peft."""
