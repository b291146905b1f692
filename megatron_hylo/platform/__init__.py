"""Process groups, the differences between CPU and GPU, safe checkpoint reading, and the table of third-party patches."""
