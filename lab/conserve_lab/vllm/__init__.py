"""Real vLLM on a CPU."""
