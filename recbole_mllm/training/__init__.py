"""How the adapter is trained: optimizer steps and gradients, checkpoints, and the model that a run exports."""
