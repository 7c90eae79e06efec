"""Video data: files in and out as clips or frame by frame, listing datasets, cutting clips, and sprites."""
