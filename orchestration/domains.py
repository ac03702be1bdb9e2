"""What a field is searched over, and with which values of other fields."""

from math import exp, log
from random import Random
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dsvl.config import require
from orchestration.settings import Section


class _Searched(Section):
    when: dict[str, Any] = Field(default_factory=dict)
    """Other searched fields -> the value of each with which this one is searched; with any other, a trial
    keeps what the experiment has."""


class Values(_Searched):
    """Any of these."""

    values: tuple[Any, ...] = Field(min_length=1)

    def probes(self) -> tuple[Any, ...]:
        """Values that must all be legal for the domain to be."""
        return self.values

    def holds(self, value: object) -> bool:
        """Whether the value is of the domain."""
        return value in self.values


class Grid(Values):
    """Every one of the values, combined with every value of the other grids."""

    kind: Literal["grid"]


class Choice(Values):
    """One of the values at random."""

    kind: Literal["choice"]

    def draw(self, chance: Random) -> Any:
        """A value."""
        return chance.choice(self.values)


class _Range(_Searched):
    low: float
    high: float

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Self:
        require(self.low < self.high, "low", self.low, f"must be below high={self.high}")
        return self

    def probes(self) -> tuple[Any, ...]:
        """Values that must all be legal for the domain to be."""
        between = self.low + (self.high - self.low) / 3**0.5  # a field of whole numbers refuses it
        return self.low, between, self.high

    def holds(self, value: object) -> bool:
        """Whether the value is of the domain."""
        return isinstance(value, float) and self.low <= value <= self.high


class Uniform(_Range):
    """A real number between `low` and `high`."""

    kind: Literal["uniform"]

    def draw(self, chance: Random) -> float:
        """A value."""
        return chance.uniform(self.low, self.high)


class LogUniform(_Range):
    """A real number between `low` and `high`, each order of magnitude as likely as another."""

    kind: Literal["loguniform"]

    @model_validator(mode="after")
    def _low_is_positive(self) -> Self:
        require(self.low > 0, "low", self.low, "must be positive")
        return self

    def draw(self, chance: Random) -> float:
        """A value."""
        return exp(chance.uniform(log(self.low), log(self.high)))


Domain = Annotated[Grid | Choice | Uniform | LogUniform, Field(discriminator="kind")]
