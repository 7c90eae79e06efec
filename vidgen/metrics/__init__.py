"""Reconstruction metrics, Fréchet video distances and FLOPs."""
