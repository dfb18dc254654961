"""From items to micro-batches: drawing items, chat templates, sampling, scoring, credit, and batching."""
