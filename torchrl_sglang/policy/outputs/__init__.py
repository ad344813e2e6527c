"""From completions to a TensorDict."""
