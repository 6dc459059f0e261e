"""Process reward models: what they learn from, how they score steps, how good they are."""
