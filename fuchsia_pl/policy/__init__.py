"""The trained model: finding and loading it, its adapter, its logprobs, and the folder that the engine loads."""
