"""Losses that teach a hybrid: chunked output-head losses and layer-wise alignment."""
