"""The driver: one asyncio loop over rollout, scoring, learning and weight sync."""
