"""docs/support.md matches what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers


SCRIPT = Path(__file__).with_name("support.py")
PAGE = Path(__file__).parents[2] / "docs" / "support.md"
VERSIONS = f"peft {peft.__version__} and transformers {transformers.__version__}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="written on a CPU")
@pytest.mark.skipif(VERSIONS not in PAGE.read_text(), reason="written with other versions")
def test_the_page_says_what_happens():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
