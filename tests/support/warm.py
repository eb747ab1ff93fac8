"""What every process of cotune makes once, made in the server from which the tests' processes are forked: a quarter of a second each."""

from __future__ import annotations

from typing import get_args

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from cotune.reporting.pages import page_environment
from cotune.strategies.registry import Kind, get_builtin_components

get_checkpoint_conversion_mapping("bert")  # compiles a thousand regular expressions
page_environment().get_template("report.html.j2")
for _kind in get_args(Kind):
    get_builtin_components(_kind)
