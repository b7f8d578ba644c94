"""The base of every group of settings."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A typed, immutable group of settings; unknown keys are errors."""

    # strict: `train.max_steps=true` is a mistake, not 1 step.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )
