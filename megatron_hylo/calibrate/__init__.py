"""What the calibrated initialisers measure on text: a streaming pass of the teacher, and output projections re-solved."""
