"""`make gpu-check`: which parts work on this machine's device, in one table. See `tests/gpu_check/__main__.py`."""
