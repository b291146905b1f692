"""What differs between CPU with gloo and GPU with NCCL. The only package that patches anything."""
