"""What a trainer holds, as named tensors of the served model."""
