"""What judges have answered, kept on disk."""
