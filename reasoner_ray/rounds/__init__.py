"""A policy and its judge taught in turns (``kind: rounds``): search in training, and RL with a judge that is kept fresh."""
