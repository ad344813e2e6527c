"""What lets SGLang's CUDA wheel import and serve on a CPU-only machine."""
