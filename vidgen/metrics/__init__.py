"""What a reconstruction, or a set of generated clips, is worth in numbers."""
