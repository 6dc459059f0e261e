"""Gymnasium environments; importing this package registers them as ``reasoner_ray/NAME-v0``.

A program that does not import it names it with the id: ``gymnasium.make("reasoner_ray.envs:reasoner_ray/TomatoSalad-v0")``.
"""

from __future__ import annotations

import gymnasium

ENTRY_POINTS = {
    "CreditChain": "reasoner_ray.envs.text.credit_chain:CreditChain",
    "DataScience": "reasoner_ray.envs.data_science:DataScience",
    "Entertainment": "reasoner_ray.envs.text.entertainment:Entertainment",
    "FoodPreparation": "reasoner_ray.envs.text.food_preparation:FoodPreparation",
    "KeyToDoor": "reasoner_ray.envs.key_to_door:KeyToDoor",
    "ObjectSearch": "reasoner_ray.envs.object_search.environment:ObjectSearch",
    "SourceTerm": "reasoner_ray.envs.source_term.environment:SourceTerm",
    "TextWorld": "reasoner_ray.envs.textworld:TextWorldGame",
    "TomatoLettuceSalad": "reasoner_ray.envs.text.overcooked:TomatoLettuceSalad",
    "TomatoSalad": "reasoner_ray.envs.text.overcooked:TomatoSalad",
}
NUMERIC = ("KeyToDoor", "ObjectSearch", "SourceTerm")
"""Those whose observations are numbers: for agents that are no language models, and not to be played in a terminal."""
VECTOR_ENTRY_POINTS = {
    "ObjectSearch": "reasoner_ray.envs.object_search.environment:ObjectSearchVector",
    "SourceTerm": "reasoner_ray.envs.source_term.environment:SourceTermVector",
}
"""Those that play many episodes at once."""


def register_all() -> None:
    """Make the environments known to Gymnasium; a second call does nothing."""
    for name, entry_point in ENTRY_POINTS.items():
        if f"reasoner_ray/{name}-v0" not in gymnasium.registry:
            gymnasium.register(
                id=f"reasoner_ray/{name}-v0",
                entry_point=entry_point,
                vector_entry_point=VECTOR_ENTRY_POINTS.get(name),
                disable_env_checker=True,
                order_enforce=False,
            )


register_all()
