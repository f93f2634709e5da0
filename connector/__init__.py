"""The vLLM connector: the only package of this repository that touches vLLM."""
