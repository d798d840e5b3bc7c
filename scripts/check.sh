#!/usr/bin/env bash
# What CI runs and a person should before a commit: lint, format, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
pytest
