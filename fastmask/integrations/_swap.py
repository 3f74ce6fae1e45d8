"""Replaces the classes of a model's modules in place, and restores them. It knows no framework.

A replacement is a subclass of the original: parameters, buffers, hooks and attributes stay where they are, and only
methods change. Nothing is stored in the model. An instance's class says what it replaced, so that copies and pickles
of the model can be restored as well.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

ModuleType = type[nn.Module]


class ClassSwap:
    """Replacements of module classes, by the original class."""

    def __init__(self, replacements: Mapping[ModuleType, ModuleType]) -> None:
        self._replacements = dict(replacements)
        self._originals = {replacement: original for original, replacement in replacements.items()}

    def apply(self, model: nn.Module) -> None:
        """Replace the class of every module in `model` that is exactly of an original class, not of a subclass."""
        _reclassify(model, self._replacements)

    def restore(self, model: nn.Module) -> None:
        """Undo `apply`."""
        _reclassify(model, self._originals)


def _reclassify(model: nn.Module, classes: Mapping[ModuleType, ModuleType]) -> None:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
