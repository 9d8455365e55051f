"""For mkdocs.yml: what our docstrings and comments mean, told to the reader of the docstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Reader(griffe.Extension):
    """`Example:` is the section that others call `Examples:`; a comment behind a field of a class describes it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Of every module, class, function and attribute that is read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^(\s*)Example:$", r"\1Examples:", obj.docstring.value)
        elif obj.is_attribute and obj.parent is not None and obj.parent.is_class:
            described = re.search(r"  # (?!type:)(.+)$", obj.source)
            if described is not None:
                # A shape in brackets is no link.
                obj.docstring = griffe.Docstring(described[1].replace("[", r"\["), parent=obj)
