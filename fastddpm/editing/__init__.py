"""Edits of pictures: started from one, inverted, interpolated, filled in; each is a table of steps and a start."""
