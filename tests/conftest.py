"""Settings of every test: nothing that was measured on this machine decides a test."""

from __future__ import annotations

import pytest
from hypothesis import settings

from accel.settings import cache_folder

# how long an example takes is the machine's doing
settings.register_profile("accel", deadline=None)
settings.load_profile("accel")


@pytest.fixture(autouse=True, scope="session")
def unmeasured_machine(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A cache folder without measurements, but with the converted models, which take long to make."""
    folder, models = tmp_path_factory.mktemp("accel-cache"), cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    (folder / "models").symlink_to(models)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_CACHE", str(folder))
        yield folder
