"""The marker of tests that load converted adapters in the libraries that people use."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interop: loads adapters in real PEFT and diffusers, where they are installed")
