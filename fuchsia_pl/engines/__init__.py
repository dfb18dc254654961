"""Who samples: the protocol, and vLLM behind it."""
