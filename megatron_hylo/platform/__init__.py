"""Starting ranks, what differs between CPU and GPU, and safe reading. The only package that patches anything."""
