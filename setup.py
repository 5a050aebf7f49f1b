"""The build of a wheel: recipes/ becomes gipo_megatron/recipes. All else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable install reads recipes/ of the checkout
            target = Path(self.build_lib, "gipo_megatron", "recipes")
            shutil.copytree("recipes", target, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithRecipes})
