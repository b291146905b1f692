"""Calibration on text: statistics from one streaming pass of the teacher, and output projections solved in closed form."""
