"""From TensorDicts to requests, and from completions to TensorDicts."""
