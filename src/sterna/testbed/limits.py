"""What numbers in a scenario file may be."""

from typing import Annotated

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
Number = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Percent = Annotated[float, msgspec.Meta(ge=0, le=100)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=86_400_000)]
