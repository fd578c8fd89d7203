"""The kinds of layers that are traced, which register themselves: a file for those that share a
formula."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
