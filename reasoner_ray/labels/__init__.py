"""Process labels: how likely is the right answer after each step of a solution? Found by sampling, never by people."""
