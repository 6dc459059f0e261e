"""The search for an unknown number of objects in a grid of rooms."""
