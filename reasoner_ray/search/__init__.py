"""Search over steps of a solution: methods, budgets, aggregation, stopping. Coroutines beside the engine of a rollout worker."""
