"""Steps on model folders: a teacher to an untrained hybrid, two aligned models to one, which layers should be MLA."""
