"""The model that learns: finding and loading it, its adapter, its logprobs, and the folder the engine is synced from."""
