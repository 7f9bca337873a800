"""Tokenizers, chat rendering with masks, trajectories, packing and loading."""
