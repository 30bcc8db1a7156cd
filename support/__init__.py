"""What the flat files stand on, and what is not the paper's."""
