"""The ways of named tensors into servers."""
