"""What a page of the theory measures and nothing else uses."""
