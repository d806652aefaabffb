"""What the training loop needs to know of each system: its batches, its loss and its evaluation."""
