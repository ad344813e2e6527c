"""From a TensorDict to lists of token ids."""
