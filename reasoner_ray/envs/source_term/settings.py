"""Settings of source-term estimation: the scene, the sensor, what is known beforehand, how the agent moves."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from reasoner_ray.section import Section

Range = tuple[float, float]
"""Lowest and highest value of a uniform draw; equal ones fix it."""


class FiniteSection(Section):
    """Settings that are lengths, speeds and the like: no number of them may be infinite or NaN."""

    model_config = ConfigDict(allow_inf_nan=False)


class SceneConfig(FiniteSection):
    """Where the source may be and how it emits. A range is drawn from anew each episode; equal ends fix the value."""

    width: float = Field(25.0, gt=0, description="m, along x")
    height: float = Field(25.0, gt=0, description="m, along y")
    x: Range = (5.0, 20.0)
    y: Range = (5.0, 20.0)
    z: Range = (0.0, 0.0)
    strength: Range = Field((5.0, 5.0), description="released mass a second")
    wind: Range = Field((2.0, 2.0), description="m/s")
    direction: Range = Field((45.0, 45.0), description="degrees; where the wind comes from, counted from the x axis")
    diffusivity: Range = Field((2.0, 2.0), description="m²/s")
    lifetime: Range = Field((10.0, 10.0), description="s, of a released particle")

    @model_validator(mode="after")
    def _ranges(self) -> SceneConfig:
        for name in ("x", "y", "z", "strength", "wind", "direction", "diffusivity", "lifetime"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the lowest value {low:g} is above the highest {high:g}")
            if low < 0 and name not in ("direction",):
                raise ValueError(f"{name}: must not be negative (got {low:g})")
        for name, size in (("x", self.width), ("y", self.height)):
            if getattr(self, name)[1] > size:
                raise ValueError(f"{name}: the source would lie outside the domain, which ends at {size:g}")
        if min(self.strength[0], self.diffusivity[0], self.lifetime[0]) <= 0:
            raise ValueError("strength, diffusivity and lifetime must be above 0")
        return self


class SensorConfig(FiniteSection):
    """A noisy point sensor that misses and has a threshold."""

    noise: float = Field(0.5, ge=0, description="standard deviation of a reading as a share of the concentration")
    background: float = Field(1e-4, ge=0, description="standard deviation that comes on top")
    threshold: float = Field(5e-4, gt=0, description="readings below it are 0")
    detection: float = Field(0.7, gt=0, le=1, description="probability that a reading is not missed")


class PriorConfig(FiniteSection):
    """What an agent knows beforehand: position within the domain, weather estimates with errors of this size."""

    z: Range = (0.0, 5.0)
    strength_shape: float = Field(2.0, gt=0, description="of a gamma distribution")
    strength_scale: float = Field(5.0, gt=0)
    wind_sd: float = Field(2.0, gt=0, description="m/s")
    direction_sd: float = Field(10.0, gt=0, description="degrees")
    diffusivity_width: float = Field(2.0, gt=0, description="the diffusivity lies up to this much above its estimate")
    lifetime_width: float = Field(2.0, gt=0, description="the lifetime lies up to this much below its estimate")
    centred: bool = Field(
        False, description="weather estimates are the truth itself, as in published code; else they err as the prior says"
    )

    @model_validator(mode="after")
    def _height(self) -> PriorConfig:
        low, high = self.z
        if not 0 <= low <= high:
            raise ValueError(f"z: ({low:g}, {high:g}) is no range of heights; give the lowest, at least 0, and then the highest")
        return self


class SourceTermConfig(FiniteSection):
    """A search for the source of a plume that nothing says is found."""

    scene: SceneConfig = SceneConfig()
    sensor: SensorConfig = SensorConfig()
    prior: PriorConfig = PriorConfig()
    moves: Literal["discrete", "heading"] = Field("discrete", description="four moves, or a heading between -pi and pi")
    speed: float = Field(1.0, gt=0, description="m a step")
    start: tuple[float, float] | Literal["random"] = (0.0, 0.0)
    clearance: float = Field(1.0, ge=0, description="m between start and source at least; 0: may start on top of it")
    max_steps: int = Field(200, ge=1)
    reward: Literal["step", "approach"] = Field(
        "step", description="-1 a step: nothing says how near the source is; or m nearer to it, which a real search cannot know"
    )

    @model_validator(mode="after")
    def _possible(self) -> SourceTermConfig:
        scene = self.scene
        if self.prior.diffusivity_width > scene.diffusivity[0] and not self.prior.centred:
            raise ValueError(
                f"prior.diffusivity_width={self.prior.diffusivity_width:g}: estimates of a diffusivity of "
                f"{scene.diffusivity[0]:g} could be negative; lower it, raise scene.diffusivity, or set prior.centred"
            )
        if self.prior.lifetime_width >= scene.lifetime[0]:
            raise ValueError(
                f"prior.lifetime_width={self.prior.lifetime_width:g}: beliefs about a lifetime of {scene.lifetime[0]:g} s could "
                "have it below 0; lower it or raise scene.lifetime"
            )
        if self.start == "random":
            far = math.hypot(max(scene.x[1], scene.width - scene.x[0]), max(scene.y[1], scene.height - scene.y[0]))
        else:
            x, y = self.start
            if not (0 <= x <= scene.width and 0 <= y <= scene.height):
                raise ValueError(f"start: ({x:g}, {y:g}) lies outside the domain of {scene.width:g} x {scene.height:g} m")
            far = math.hypot(max(abs(x - end) for end in scene.x), max(abs(y - end) for end in scene.y))
        if far <= self.clearance and self.clearance > 0:
            raise ValueError(
                f"clearance: no source lies {self.clearance:g} m away from the start, the farthest {far:g} m; "
                "lower it, move start or widen scene"
            )
        return self
