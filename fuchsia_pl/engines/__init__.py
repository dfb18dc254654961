"""Engines that generate completions: the interface, and vLLM in this process or in servers."""
