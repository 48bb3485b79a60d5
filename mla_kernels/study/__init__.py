"""What the notebooks share, and running them."""
