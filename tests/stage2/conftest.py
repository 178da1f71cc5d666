import pytest
from tests.stage2.support import GEOMETRIES, Geometry


@pytest.fixture(params=GEOMETRIES, ids=lambda geometry: geometry.name)
def geometry(request: pytest.FixtureRequest) -> Geometry:
    """Each format in turn."""
    return request.param
