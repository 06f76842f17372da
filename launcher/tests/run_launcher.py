"""text-generation-launcher with fake children; a script, because the launcher's death is part of what is tested."""

import sys
from pathlib import Path

from tgi_launcher.children import Programs
from tgi_launcher.cli import main

here = Path(__file__).parent


def program(name: str) -> tuple[str, ...]:
    return (sys.executable, str(here / name))


main(
    programs=Programs(
        shard=program("fake_shard.py"),
        router=program("fake_router.py"),
        download=(sys.executable, "-m", "tgi_launcher.download"),
        convert=program("fake_convert.py"),
    )
)
