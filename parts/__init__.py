"""What the scripts lean on, one thing a file; each can be looked up by its name."""
