"""One tiny model per set-up and module; tests that change a model take a copy."""

import copy

import pytest

import tiny_models
from tiny_models import Tiny


@pytest.fixture(params=list(tiny_models.SETUPS), scope="module")
def setup(request: pytest.FixtureRequest) -> Tiny:
    return tiny_models.build(request.param)


@pytest.fixture()
def copied(setup: Tiny) -> Tiny:
    return Tiny(copy.deepcopy(setup.model), setup.clone(), setup.family, setup.spans)
