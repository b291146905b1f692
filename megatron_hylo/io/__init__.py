"""Files: atomic folders with manifests, the cache folder, progress."""
