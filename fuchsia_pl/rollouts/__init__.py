"""From items to micro-batches: what is drawn, chat to ids, sampling and scoring, and the one shift."""
