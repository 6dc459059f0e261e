"""Rollouts: vLLM engines behind one small interface, episodes as coroutines, a pool of Ray actors."""
