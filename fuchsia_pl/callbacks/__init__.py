"""What happens around the training loop: one class, one file each."""
