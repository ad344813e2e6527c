"""TorchRL's faces of a weight sync."""
