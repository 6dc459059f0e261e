"""Settings of the search for objects: the floor, the objects, the eyes."""

from __future__ import annotations

from pydantic import Field, field_validator

from reasoner_ray.section import Section


class ObjectSearchConfig(Section):
    """A search for objects that nothing says are all found. The floor is four rooms with a gap between neighbours."""

    size: int = Field(11, ge=7, le=31, description="cells along a side, walls included; odd")
    most: int = Field(4, ge=1, le=8, description="objects at most; each number from 0 to this is equally likely")
    view: int = Field(5, ge=3, description="cells along a side of what is in sight, ahead of the agent; odd")
    detection: float = Field(0.7, gt=0, le=1, description="probability that an object in sight is noticed, at each step")
    max_steps: int = Field(200, ge=1)

    @field_validator("size", "view")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"must be odd (got {value})")
        return value
