"""Context parallelism inside layers, packed documents, and pipeline passes without a schedule."""
