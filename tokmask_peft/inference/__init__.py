"""Use what was trained: load an adapter, predict texts and files, merge it into a plain model."""
