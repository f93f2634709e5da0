"""The store for others than vLLM: SGLang's HiCache, and Hugging Face models without an engine.

Each module imports what it is for, so nothing of the store imports this package.
"""
